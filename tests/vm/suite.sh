# What runs in each guest, unless run.py is told otherwise.
set -e
export UMMUNOTIFY_REQUIRE=all PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
for source in bpf:kvm; do
    echo "== $source: each change of a mapping"
    UMMUNOTIFY_SOURCE=$source python -m pytest -q -p no:cacheprovider tests/test_changes.py -k test_by_the_same_thread
done

# What runs in each guest, unless run.py is told otherwise.
set -e
# Not "changes": what this kernel cannot do is no failure.
export UMMUNOTIFY_REQUIRE=bpf,rdma,cgroup PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
for source in bpf:kvm; do
    echo "== $source: each change of a mapping"
    UMMUNOTIFY_SOURCE=$source python -m pytest -q -rsfE --tb=short -p no:cacheprovider tests/test_changes.py -k 'same_thread or reclaim'
done

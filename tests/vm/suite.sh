# What runs in each guest, unless run.py is told otherwise: what depends on how the kernel preempts, once for each kernel what
# depends on the kernel, and the tests that kernels.toml names for it. With UMMUNOTIFY_SLOW set, all that there is.
set -e
# Not "changes": what this kernel cannot do is no failure.
export UMMUNOTIFY_REQUIRE=bpf,uffd,rdma,cgroup,libfabric,mpi PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export HYPOTHESIS_STORAGE_DIRECTORY=/var/tmp/hypothesis
tests="$UMMUNOTIFY_VM_TESTS${UMMUNOTIFY_SLOW:+ rdma circumstances slow}" become=

step() { echo "== $(cut -d' ' -f1 /proc/uptime) s: $*"; }
selftest() { "$@" >/run/selftest || { cat /run/selftest && exit 1; } && tail -n 1 /run/selftest; }
run_tests() { $become python -m pytest -v -rsfE --tb=short --durations=10 -p no:cacheprovider "$@"; }

sources=$(python -c 'from ummunotify import sources; print(*(each.name for each in sources.every()))')
for source in $sources; do
    case $source in daemon | uffd) continue ;; esac
    step "root, $source"
    selftest ummunotify selftest --source "$source"
done
if [ -z "$tests" ]; then
    step "done"
    exit
fi

nobody="setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all"
step "nobody, uffd"
selftest $nobody ummunotify selftest --source uffd
step "nobody, daemon"
ummunotify daemon --socket /run/ummunotify/socket --user nobody --probe zap &
while [ ! -S /run/ummunotify/socket ]; do sleep 0.2; done
selftest $nobody ummunotify selftest --source daemon
kill $!
wait $!
step "tests"
run_tests tests/test_zap.py
for name in $tests; do
    step "tests: $name"
    case $name in
    rdma)
        run_tests tests/vm/test_rdma.py tests/vm/test_libfabric_rdma.py tests/vm/test_daemon_probes.py
        become=$nobody
        run_tests tests/test_stress.py ${UMMUNOTIFY_SLOW:+tests/test_model.py} -k uffd
        become=
        ;;
    circumstances)
        run_tests tests/vm/test_circumstances.py
        ;;
    slow)
        run_tests tests/test_changes.py tests/test_stress.py
        ;;
    esac
done
case $tests in
*circumstances*)
    step "lockdown"
    run_tests tests/vm/lockdown.py
    ;;
esac
step "done"

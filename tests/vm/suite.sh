# What runs in each guest, unless run.py is told otherwise: all of it in that which UMMUNOTIFY_VM_WHOLE is set for; elsewhere
# what depends on the kernel, once for each kernel, and what depends on how it preempts. With UMMUNOTIFY_SLOW set, more of it.
set -e
# Not "changes": what this kernel cannot do is no failure.
export UMMUNOTIFY_REQUIRE=bpf,uffd,rdma,cgroup,libfabric,mpi PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export HYPOTHESIS_STORAGE_DIRECTORY=/var/tmp/hypothesis
whole=$UMMUNOTIFY_VM_WHOLE$UMMUNOTIFY_SLOW become=

step() { echo "== $(cut -d' ' -f1 /proc/uptime) s: $*"; }
selftest() { "$@" >/run/selftest || { cat /run/selftest && exit 1; } && tail -n 1 /run/selftest; }
run_tests() { $become python -m pytest -q -rsfE --tb=short --durations=5 -p no:cacheprovider "$@"; }

sources=$(python -c 'from ummunotify import sources; print(*(each.name for each in sources.every()))')
for source in $sources; do
    case $source in daemon | uffd) continue ;; esac
    step "root, $source"
    selftest ummunotify selftest --source "$source"
done

case $whole:$UMMUNOTIFY_VM in
:*/voluntary) step "done" && exit ;;
esac

nobody="setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all"
step "nobody, uffd"
selftest $nobody ummunotify selftest --source uffd
for probe in zap ${whole:+kvm}; do
    step "nobody, daemon, $probe"
    rm -f /run/ummunotify/socket
    ummunotify daemon --socket /run/ummunotify/socket --user nobody --probe $probe &
    while [ ! -S /run/ummunotify/socket ]; do sleep 0.2; done
    selftest $nobody ummunotify selftest --source daemon
    kill $!
    wait $!
done

step "tests"
run_tests tests/test_zap.py ${whole:+tests/vm} ${UMMUNOTIFY_SLOW:+tests/test_changes.py tests/test_stress.py}
if [ -n "$whole" ]; then
    step "nobody, tests"
    become=$nobody
    run_tests tests/test_stress.py tests/test_model.py -k uffd
    become=
    step "lockdown"
    run_tests tests/vm/lockdown.py
fi
step "done"

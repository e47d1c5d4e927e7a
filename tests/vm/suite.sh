# What runs in each guest, unless run.py is told otherwise: all changes of a mapping with all sources, under each preemption model,
# and the tests that kernels.toml names for this kernel. With UMMUNOTIFY_SLOW set, all that there is.
set -e
# Not "changes": what this kernel cannot do is no failure.
export UMMUNOTIFY_REQUIRE=bpf,uffd,rdma,cgroup,libfabric,mpi PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export HYPOTHESIS_STORAGE_DIRECTORY=/var/tmp/hypothesis
tests=$UMMUNOTIFY_VM_TESTS
if [ -n "$UMMUNOTIFY_SLOW" ]; then
    tests="tests/test_zap.py tests/test_changes.py tests/test_stress.py tests/test_processes.py $(ls tests/vm/test_*.py) tests/vm/lockdown.py"
fi
nobody="setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all"
model=/sys/kernel/debug/sched/preempt

step() { echo "== $(cut -d' ' -f1 /proc/uptime) s: $*"; }
run_tests() { "$@" -v -rsfE --tb=short --durations=10 -p no:cacheprovider; }
fail() { cat /run/selftest && exit 1; }
# Every change, with the sources named first, which must all be there and miss nothing: in one process, as it takes long to start.
selftest() {
    expected=$1
    shift
    step "$*: $expected, preempt=$(grep -so '(.*)' $model)"
    "$@" >/run/selftest || fail
    for source in $expected; do grep "^$source: no miss" /run/selftest || fail; done
}

for each in ${UMMUNOTIFY_VM_PREEMPT:-fixed}; do
    [ "$each" = fixed ] || { echo "$each" >$model && grep -q "($each)" $model; }
    selftest "$UMMUNOTIFY_VM_SOURCES" ummunotify selftest --source bpf
done
probe=${UMMUNOTIFY_VM_SOURCES##*:} # the last
ummunotify daemon --socket /run/ummunotify/socket --user nobody --probe "$probe" &
while [ ! -S /run/ummunotify/socket ]; do kill -0 $!; sleep 0.2; done
selftest "daemon:$probe uffd" $nobody ummunotify selftest
kill $!
wait $!
step "nobody: stress"
UMMUNOTIFY_CHANGES=${UMMUNOTIFY_CHANGES:-2000} run_tests $nobody python -m pytest tests/test_stress.py ${UMMUNOTIFY_SLOW:+tests/test_model.py} -k uffd
if [ -n "$UMMUNOTIFY_VM_CORE" ]; then
    step "tests/core"
    meson test -C "$UMMUNOTIFY_VM_CORE" --no-rebuild --suite core --num-processes 1 --timeout-multiplier 20 --print-errorlogs
fi
step "tests"
run_tests python -m pytest $tests
step "done"

# What runs in each guest, unless run.py is told otherwise: the steps below, or those that UMMUNOTIFY_STEPS names. A step that fails
# hides none of the others. With UMMUNOTIFY_SLOW set, `tests` runs all that there is.
#
# selftest  every change, as root: the sources of BPF that kernels.toml names
# nobody    every change, without privileges: the daemon and userfaultfd; and stress with the latter
# core      the programs of tests/core, where run.py has compiled them for another architecture
# tests     what kernels.toml names for this kernel
# tests/... these tests
#
# Not "changes": what this kernel cannot do is no failure.
export UMMUNOTIFY_REQUIRE=bpf,uffd,rdma,cgroup,libfabric,mpi,cython,gcc,numpy PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export HYPOTHESIS_STORAGE_DIRECTORY=/var/tmp/hypothesis
nobody="setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all"

say() { echo "== $(cut -d' ' -f1 /proc/uptime) s: $*"; }
run_tests() { "$@" -v -rsfE --tb=short --durations=10 -p no:cacheprovider; }
fail() { cat /run/selftest && exit 1; }
# With the sources named first, which must all be there and miss nothing: in one process, as it takes long to start.
all_changes() {
    expected=$1
    shift
    say "$*: $expected, preempt=$(grep -so '(.*)' /sys/kernel/debug/sched/preempt)"
    "$@" >/run/selftest || fail
    for source in $expected; do grep "^$source: no miss" /run/selftest || fail; done
}

selftest() {
    all_changes "$UMMUNOTIFY_VM_SOURCES" ummunotify selftest --source bpf
}

nobody() {
    probe=${UMMUNOTIFY_VM_SOURCES##*:} # the last
    ummunotify daemon --socket /run/ummunotify/socket --user nobody --probe "$probe" &
    daemon=$!
    trap 'kill $daemon' EXIT
    while [ ! -S /run/ummunotify/socket ]; do kill -0 $daemon; sleep 0.2; done
    all_changes "daemon:$probe uffd" $nobody ummunotify selftest
    trap - EXIT
    kill $daemon
    wait $daemon
    say "nobody: stress"
    UMMUNOTIFY_CHANGES=${UMMUNOTIFY_CHANGES:-500} run_tests $nobody python -m pytest tests/test_stress.py \
        ${UMMUNOTIFY_SLOW:+tests/test_model.py} -k uffd
}

core() {
    [ -z "$UMMUNOTIFY_VM_CORE" ] && return
    say "tests/core"
    cd "$UMMUNOTIFY_VM_CORE"
    set --
    # Older compilers' does not know the address space that there is with pages of 16 KiB.
    if tests/core/epoch_test-tsan threads 2>&1 | grep "ThreadSanitizer: unsupported VMA range"; then
        say "tests/core: not those with the thread sanitizer"
        set -- $(meson test --no-rebuild --suite core --list | sed 's/.*://' | grep -v tsan)
    fi
    meson test --no-rebuild --suite core --num-processes 1 --timeout-multiplier 20 --print-errorlogs "$@"
}

tests() {
    if [ -n "$UMMUNOTIFY_SLOW" ]; then
        set -- tests/test_zap.py tests/test_changes.py tests/test_stress.py tests/test_processes.py tests/vm/test_*.py \
            tests/vm/lockdown.py
    else
        set -- $UMMUNOTIFY_VM_TESTS
        export UMMUNOTIFY_CHANGES=${UMMUNOTIFY_CHANGES:-5000}
    fi
    say "tests"
    run_tests python -m pytest "$@"
}

failed=
for step in ${UMMUNOTIFY_STEPS:-selftest nobody core tests}; do
    case $step in
    tests/*) run_tests python -m pytest "$step" ;;
    *) (set -e && "$step") ;; # not with || or &&, which would switch -e off
    esac
    [ $? = 0 ] || failed="$failed $step"
done
say "done${failed:+, but for:$failed}"
[ -z "$failed" ]

"""Where invalidations come from, as far as it takes privileges: the BPF program of the process."""

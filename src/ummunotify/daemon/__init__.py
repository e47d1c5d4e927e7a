"""The daemon: holds the privileges that loading BPF needs, and gives descriptors to those who lack them."""

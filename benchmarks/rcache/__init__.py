"""What the section "cache" measures."""

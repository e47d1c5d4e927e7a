"""What `ummunotify audit` makes of the records that the processes leave (src/libummunotify/audit writes them)."""

"""The commands of `treering`, one file each."""

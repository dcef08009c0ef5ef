"""Methods that BCS is compared with, one file each."""

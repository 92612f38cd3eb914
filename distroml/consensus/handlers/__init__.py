"""What each command does to the cluster's state: one pure function per command, one module per noun."""

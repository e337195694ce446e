"""What every command shares: its options, its messages and progress, and loading it when it is called."""

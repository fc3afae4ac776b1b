"""Lower a program to something that runs, keep it, and bring it back."""

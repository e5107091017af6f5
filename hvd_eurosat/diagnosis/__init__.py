"""What a machine and a job are made of, and what is wrong with them, for `doctor`."""

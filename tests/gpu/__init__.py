"""What takes a GPU: `make test-gpu`, where there is one."""

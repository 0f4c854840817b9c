"""What other libraries need to find fp8, a module for each. None of them is imported here."""

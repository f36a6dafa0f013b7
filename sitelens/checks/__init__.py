"""Values, arguments and files checked against type hints at the door."""

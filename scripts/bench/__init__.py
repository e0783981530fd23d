"""What the product costs, measured beside what others use."""

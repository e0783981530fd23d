"""What ranks tell each other: one call's exchange, who adds up, and what every rank is doing."""

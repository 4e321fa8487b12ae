"""What the batch API costs, and what a batch costs interactive traffic."""

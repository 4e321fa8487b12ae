"""What the connector costs a real vLLM: time in the scheduler's step, and throughput without hits."""

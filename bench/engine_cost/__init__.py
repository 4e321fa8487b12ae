"""What the connector costs a real vLLM: time in the scheduler's step, throughput without hits."""

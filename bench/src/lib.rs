//! Benchmarks of kvtide.

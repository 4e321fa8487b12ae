//! The wire protocol: what holds for every message and all bytes, what is recorded of the format,
//! and what its page says.

mod any_message;
mod counting_allocator;
mod frames;
mod memory;
mod messages;
mod page;
mod recorded;

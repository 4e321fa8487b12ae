//! Input files: one JSON object a line, checked while they stream by, remembered as an index of a
//! few bytes a line.

mod index;
mod line;
mod object;
mod prefix;
mod scan;

pub use index::{Entry, Index};
pub use line::{Request, Rules};
pub use object::Object;
pub use scan::{Scan, scan};

/// Requests in one batch, as OpenAI allows.
pub const REQUESTS_MAX: u32 = 50_000;
/// Bytes of one input file, as OpenAI allows.
pub const FILE_BYTES_MAX: u64 = 200 * 1000 * 1000;
/// What some editors, on Windows above all, write before a text in UTF-8. It is no part of the first
/// line.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Bytes of one line, without its line feed.
pub const LINE_BYTES_MAX: usize = 8 << 20;
/// Inputs of all embedding requests of a batch together, as OpenAI allows.
pub const EMBEDDING_INPUTS_MAX: u64 = 50_000;
/// Bytes of one `custom_id`.
pub const CUSTOM_ID_BYTES_MAX: usize = 1024;
/// Bytes of a model's name.
pub const MODEL_BYTES_MAX: usize = 256;
/// Models that one batch may name, where it may name several.
pub const MODELS_MAX: usize = 64;

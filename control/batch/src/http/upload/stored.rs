//! The file of an upload, on its way to the blob store.

use multer::Field;

use super::arriving::arrived;
use super::quota::Quota;
use crate::blobs::BlobWriter;
use crate::file;
use crate::http::auth::Caller;
use crate::http::reserve::Reservation;
use crate::http::{ApiError, App};
use crate::id;

/// Bytes of a file's name.
const FILENAME_BYTES_MAX: usize = 512;
/// Bytes of its media type.
const MEDIA_TYPE_BYTES_MAX: usize = 256;

/// A file whose bytes have been written, and that nobody can see yet.
pub(super) struct Stored {
    pub(super) id: String,
    pub(super) filename: String,
    pub(super) media_type: Option<String>,
    pub(super) bytes: u64,
    pub(super) digest: blake3::Hash,
    pub(super) writer: Box<dyn BlobWriter>,
    pub(super) reservation: Option<Reservation>,
}

/// The media type that the form gives a file.
fn media_type(field: &Field<'_>) -> Result<Option<String>, ApiError> {
    let said = field.content_type().map(|kind| kind.as_ref().to_owned());
    match said {
        Some(kind) if kind.len() > MEDIA_TYPE_BYTES_MAX => {
            let message =
                format!("The file's Content-Type may have at most {MEDIA_TYPE_BYTES_MAX} bytes.");
            Err(ApiError::invalid("file", "invalid_value", message))
        }
        said => Ok(said),
    }
}

/// Writes a file while it arrives.
pub(super) async fn store(
    app: &App,
    caller: &Caller,
    mut field: Field<'_>,
    bytes_max: u64,
) -> Result<Stored, ApiError> {
    let filename = field.file_name().unwrap_or("upload").to_owned();
    if filename.len() > FILENAME_BYTES_MAX {
        let message = format!("The file's name may have at most {FILENAME_BYTES_MAX} bytes.");
        return Err(ApiError::invalid("file", "invalid_value", message));
    }
    let media_type = media_type(&field)?;
    let mut quota = Quota::of(app, caller).await?;
    let id = id::fresh("file-")?;
    let mut writer = app.blobs.create(&file::blob_key(&id)).await?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0u64;
    let arrived = async {
        while let Some(chunk) = arrived(field.chunk().await)? {
            bytes = bytes.saturating_add(chunk.len() as u64);
            if bytes > bytes_max {
                let message = format!("The file may have at most {bytes_max} bytes.");
                return Err(ApiError::too_large("file", message));
            }
            if let Some(quota) = &mut quota {
                quota.take(chunk.len() as u64).await?;
            }
            hasher.update(&chunk);
            writer.write(chunk).await?;
        }
        Ok(())
    };
    if let Err(error) = arrived.await {
        writer.abandon().await;
        return Err(error);
    }
    Ok(Stored {
        id,
        filename,
        media_type,
        bytes,
        digest: hasher.finalize(),
        writer,
        reservation: quota.map(|quota| quota.reservation),
    })
}

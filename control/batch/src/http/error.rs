//! What a client is told of a failure.

use kvtide_control_base::openai::ApiError;

use crate::error::Failure;

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure {
            Failure::Illegal(illegal) => ApiError::conflict(format!("{illegal}.")),
            Failure::Quota { quota_bytes } => ApiError::over_quota(
                "file",
                format!("Your files may take {quota_bytes} bytes together: delete some first."),
            ),
            Failure::Crowded { live, whose } => ApiError::busy(format!(
                "{live} {whose} batches are waiting or in progress: try again when some have ended."
            )),
            failure => {
                tracing::error!(error = %failure, "a request failed");
                ApiError::internal()
            }
        }
    }
}

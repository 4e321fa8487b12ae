//! The CA of the controller's own certificate in the webhook configuration: put there, and put back
//! whenever the configuration is made anew or written without it, as `kubectl apply` does. Without it
//! the API server trusts nobody, and validation is silently off.
//!
//! Every replica does so; they write the same. Where another controller, or a replica from before the
//! certificate was renewed, has another CA, the one that started last wins: each puts its own there when
//! it starts, and from then on fills only what is empty.

use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kvtide_control_kube::error::said;
use serde_json::{Value, json};

/// After a write that was refused; doubles up to [`RETRY_LONGEST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between tries.
const RETRY_LONGEST: Duration = Duration::from_secs(60);
/// After a write that succeeded: somebody who takes the CA out each time does not keep us busy.
const PUT_BACK_EVERY: Duration = Duration::from_secs(1);

/// Which webhooks are given the CA.
#[derive(Clone, Copy)]
enum Claim {
    /// All that have not got it: who comes, replaces what was there before.
    All,
    /// Those that have none: another one is of somebody who came later.
    Vacant,
}

/// Keeps the CA in the configuration for as long as it is polled.
pub async fn keep_trusted(client: Client, configuration: &str, authority: &[u8]) {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let looks = watch_object(api.clone(), configuration).default_backoff();
    let mut looks = std::pin::pin!(looks);
    let mut claim = Claim::All;
    while let Some(look) = looks.next().await {
        match look {
            Ok(Some(found)) => {
                if !changes(&found, authority, claim).is_empty() {
                    put(&api, configuration, authority, claim).await;
                }
                claim = Claim::Vacant;
            }
            Ok(None) => tracing::warn!(
                configuration,
                "no such ValidatingWebhookConfiguration: nobody asks the webhook"
            ),
            Err(error) => {
                let error = said(&error);
                tracing::warn!(error, "watch of the webhook configuration interrupted");
            }
        }
    }
}

/// Puts the CA there, however often it takes.
async fn put(
    api: &Api<ValidatingWebhookConfiguration>,
    configuration: &str,
    authority: &[u8],
    claim: Claim,
) {
    let mut pause = RETRY_FIRST;
    loop {
        match try_put(api, configuration, authority, claim).await {
            Ok(()) => {
                tracing::info!(configuration, "the API server is told the webhook's CA");
                return tokio::time::sleep(PUT_BACK_EVERY).await;
            }
            Err(error) => {
                let error = said(error.as_ref());
                tracing::warn!(?pause, error, "the webhook's CA could not be told");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

async fn try_put(
    api: &Api<ValidatingWebhookConfiguration>,
    configuration: &str,
    authority: &[u8],
    claim: Claim,
) -> anyhow::Result<()> {
    let found = api.get_opt(configuration).await?;
    // One that is gone is looked at when it comes again.
    let Some(found) = found else { return Ok(()) };
    let mut operations = changes(&found, authority, claim);
    if operations.is_empty() {
        return Ok(());
    }
    // Positions are of the version that was read.
    let version = found.metadata.resource_version;
    let same = json!({"op": "test", "path": "/metadata/resourceVersion", "value": version});
    operations.insert(0, same);
    let patch = serde_json::from_value(json!(operations)).context("the patch of the CA")?;
    let patch: Patch<Value> = Patch::Json(patch);
    api.patch(configuration, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

/// What puts the CA into every webhook that is claimed.
fn changes(found: &ValidatingWebhookConfiguration, authority: &[u8], claim: Claim) -> Vec<Value> {
    let webhooks = found.webhooks.iter().flatten().enumerate();
    let claimed = webhooks.filter(|(_, webhook)| {
        let bundle = webhook.client_config.ca_bundle.as_ref();
        bundle.is_none_or(|bundle| match claim {
            Claim::All => bundle.0 != authority,
            Claim::Vacant => bundle.0.is_empty(),
        })
    });
    let changes = claimed.map(|(at, _)| {
        json!({"op": "add", "path": format!("/webhooks/{at}/clientConfig/caBundle"),
            "value": STANDARD.encode(authority)})
    });
    changes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_authority_is_replaced_once_and_a_missing_one_always() {
        let webhook = |bundle: Value| {
            json!({"name": "w", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "clientConfig": {"url": "https://w", "caBundle": bundle}})
        };
        let ours = STANDARD.encode("ours");
        let webhooks = [
            webhook(json!(ours)),
            webhook(Value::Null),
            webhook(json!("b3RoZXI=")),
            webhook(json!("")),
        ];
        let found = serde_json::from_value(json!({"webhooks": webhooks})).unwrap();
        let table = [(Claim::All, vec![1, 2, 3]), (Claim::Vacant, vec![1, 3])];
        for (claim, expected) in table {
            let expected = expected.into_iter().map(|at| {
                json!({"op": "add", "path": format!("/webhooks/{at}/clientConfig/caBundle"),
                    "value": ours})
            });
            let expected: Vec<Value> = expected.collect();
            assert_eq!(changes(&found, b"ours", claim), expected);
        }
    }
}

//! Follows which CRDs are installed.

use std::time::Duration;

use kvtide_control_api::meta::key_of;
use kvtide_control_kube::crd_gap::{Generations, generations, installed_gap};
use kvtide_control_kube::error::explained;
use kvtide_control_kube::trigger::Trigger;
use kvtide_control_reconcile::Context;

/// How often the CRDs are looked at. Somebody who installs others waits this long for the condition.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Looks at the CRDs from time to time for as long as it is polled, and at everything once more when
/// others were installed. Between changes a look costs three small requests.
pub(super) async fn follow(context: &Context, services: &Trigger, role_sets: &Trigger) {
    let mut known: Option<Generations> = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let looked = async {
            let found = generations(&context.client).await?;
            if known.as_ref() == Some(&found) {
                return Ok(None);
            }
            anyhow::Ok(Some((installed_gap(&context.client).await?, found)))
        };
        let (gap, found) = match looked.await {
            Ok(Some(changed)) => changed,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(error = explained(&error), "could not look at the CRDs");
                continue;
            }
        };
        let lost = gap.lost.clone();
        let other = context.crd_gap.note(gap);
        // The first look finds what was found at the start, unless others were installed since.
        if known.replace(found).is_some() || other {
            context.writer.try_again();
        }
        if !other {
            continue;
        }
        match lost {
            Some(lost) => tracing::warn!("{lost}"),
            None => tracing::info!("the installed CRDs are of this version"),
        }
        let all = context.services.all();
        all.iter()
            .for_each(|object| services.fire(key_of(object.as_ref())));
        let all = context.role_sets.all();
        all.iter()
            .for_each(|object| role_sets.fire(key_of(object.as_ref())));
    }
}

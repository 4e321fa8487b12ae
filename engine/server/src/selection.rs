//! Which namespace a person means.

use crate::node::Refusal;
use crate::status::Status;

/// Digits of an id that are enough, if no other begins with them.
const LEAST_DIGITS: usize = 4;

/// The id of the namespace that `named` is the id of, the beginning of an id of, or the model of.
///
/// # Errors
/// [`Refusal`] when it is none or several; it names those that there are.
pub fn namespace_of(status: &Status, named: &str) -> Result<String, Refusal> {
    let is_beginning = named.len() >= LEAST_DIGITS && named.chars().all(|c| c.is_ascii_hexdigit());
    let lower = named.to_lowercase();
    // A model may be named in hexadecimal digits, so that its name goes first.
    let of_model: Vec<_> = status
        .namespaces
        .iter()
        .filter(|n| n.model == named)
        .collect();
    let found = if of_model.is_empty() {
        let of_id = status.namespaces.iter();
        of_id
            .filter(|n| is_beginning && n.namespace.starts_with(&lower))
            .collect()
    } else {
        of_model
    };
    let list = |namespaces: &mut dyn Iterator<Item = &crate::status::Namespace>| {
        let entries = namespaces.map(|n| match n.tenant.as_str() {
            "" => format!("{} ({})", n.namespace, n.model),
            tenant => format!("{} ({}, tenant {tenant})", n.namespace, n.model),
        });
        entries.collect::<Vec<_>>().join(", ")
    };
    match found.as_slice() {
        [one] => Ok(one.namespace.clone()),
        [] if status.namespaces.is_empty() => Err(Refusal {
            problem: format!("there is no namespace {named:?}, nor any other"),
            fix: "wait until an engine has connected".into(),
        }),
        [] => Err(Refusal {
            problem: format!("there is no namespace {named:?}"),
            fix: format!("name one of {}", list(&mut status.namespaces.iter())),
        }),
        several => Err(Refusal {
            problem: format!("{named:?} may be each of {} namespaces", several.len()),
            fix: format!("name one of {}", list(&mut several.iter().copied())),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Namespace;

    fn status(namespaces: &[(&str, &str)]) -> Status {
        let namespace = |&(id, model): &(&str, &str)| Namespace {
            namespace: id.to_owned(),
            model: model.to_owned(),
            ..Namespace::default()
        };
        Status {
            namespaces: namespaces.iter().map(namespace).collect(),
            ..Status::default()
        }
    }

    #[test]
    fn a_namespace_is_named_by_its_id_its_beginning_or_its_model() {
        let status = status(&[("aaaa11", "Llama"), ("aaaa22", "Qwen"), ("bbbb33", "Qwen")]);
        let of = |named: &str| namespace_of(&status, named).map_err(|refusal| refusal.to_string());
        assert_eq!(of("aaaa22").unwrap(), "aaaa22");
        assert_eq!(of("BBBB").unwrap(), "bbbb33");
        assert_eq!(of("Llama").unwrap(), "aaaa11");
        assert_eq!(
            of("Qwen").unwrap_err(),
            "\"Qwen\" may be each of 2 namespaces; name one of aaaa22 (Qwen), bbbb33 (Qwen)"
        );
        assert_eq!(
            of("bbb").unwrap_err(),
            "there is no namespace \"bbb\"; name one of aaaa11 (Llama), aaaa22 (Qwen), bbbb33 (Qwen)"
        );
    }

    #[test]
    fn of_several_tenants_one_has_to_be_named_by_its_id() {
        let mut status = status(&[("aaaa11", "Llama"), ("aaaa22", "Llama")]);
        status.namespaces[1].tenant = "acme".to_owned();
        assert_eq!(
            namespace_of(&status, "Llama").unwrap_err().to_string(),
            "\"Llama\" may be each of 2 namespaces; name one of aaaa11 (Llama), aaaa22 (Llama, tenant \
             acme)"
        );
    }

    #[test]
    fn a_model_that_looks_like_an_id_is_a_model() {
        let status = status(&[("cafe1234", "Llama"), ("aaaa1111", "cafe")]);
        assert_eq!(namespace_of(&status, "cafe").unwrap(), "aaaa1111");
    }
}

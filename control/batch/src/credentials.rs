//! Names and passwords in URLs, `http://name:password@host`: they are taken out before a URL is used or
//! shown. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;

/// A name and a password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    name: Vec<u8>,
    password: Vec<u8>,
}

impl Login {
    /// What `Authorization` says.
    pub(super) fn basic(&self) -> String {
        let both = [&self.name[..], b":", &self.password[..]].concat();
        format!("Basic {}", STANDARD.encode(both))
    }
}

/// The URL without them, and them.
pub(super) fn taken_out(url: &str) -> (String, Option<Login>) {
    let Some((scheme, login, rest)) = split(url) else {
        return (url.to_owned(), None);
    };
    let (name, password) = login.split_once(':').unwrap_or((login, ""));
    let login = Login {
        name: percent_decode_str(name).collect(),
        password: percent_decode_str(password).collect(),
    };
    (format!("{scheme}{rest}"), Some(login))
}

/// The URL as it may be shown, even where it is none: a password may have any character.
pub(super) fn hidden(url: &str) -> String {
    let Some((before, rest)) = url.rsplit_once('@') else {
        return url.to_owned();
    };
    let mut schemes = ["http://", "https://"].into_iter();
    let scheme = schemes.find(|scheme| before.starts_with(scheme));
    format!("{}***@{rest}", scheme.unwrap_or_default())
}

/// What is before them, they, and what is behind the '@'.
fn split(url: &str) -> Option<(&str, &str, &str)> {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = url.split_at(begin);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let at = rest[..end].rfind('@')?;
    Some((scheme, &rest[..at], &rest[at + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_passwords_are_found_wherever_they_are() {
        for (url, expected, basic) in [
            ("http://host:80/v1", "http://host:80/v1", None),
            ("http://host/a@b", "http://host/a@b", None),
            ("http://u:p@host/v1", "http://host/v1", Some("u:p")),
            ("https://u%40x:p%3Aq@h", "https://h", Some("u@x:p:q")),
            ("http://u:p@q@h", "http://h", Some("u:p@q")),
            ("http://token@h", "http://h", Some("token:")),
        ] {
            let (without, login) = taken_out(url);
            assert_eq!(without, expected);
            let expected = basic.map(|both| format!("Basic {}", STANDARD.encode(both)));
            assert_eq!(login.map(|login| login.basic()), expected, "{url}");
        }
    }

    #[test]
    fn what_is_shown_has_no_password_even_where_it_is_no_url() {
        for url in ["http://u:secret@host:x", "u:secret@host", "htp:/u:secret@h"] {
            assert!(!hidden(url).contains("secret"), "{url}");
        }
        for url in ["http://u:se/cret@h", "http://u:se?cret@h", "x:se://cret@h"] {
            let shown = hidden(url);
            assert!(!shown.contains("se") && !shown.contains("cret"), "{shown}");
        }
        assert_eq!(hidden("http://host"), "http://host");
    }
}

//! Ids of users and groups, by name or number.
//!
//! Names are looked up in `/etc/passwd` and `/etc/group` alone: a directory service is not asked, which
//! could keep the daemon from starting.

use std::fs;

/// A user or group that this machine does not know.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{setting}: {file} has no {name:?}; create it, or set its number")]
pub struct NoSuchPrincipal {
    setting: &'static str,
    file: &'static str,
    name: String,
}

/// The id of a user.
///
/// # Errors
/// [`NoSuchPrincipal`] when there is none of that name.
pub fn user_id(name: &str) -> Result<u32, NoSuchPrincipal> {
    id("socket.owner", "/etc/passwd", name)
}

/// The id of a group.
///
/// # Errors
/// [`NoSuchPrincipal`] when there is none of that name.
pub fn group_id(name: &str) -> Result<u32, NoSuchPrincipal> {
    id("socket.group", "/etc/group", name)
}

fn id(setting: &'static str, file: &'static str, name: &str) -> Result<u32, NoSuchPrincipal> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = fs::read_to_string(file).unwrap_or_default();
    id_in(&text, name).ok_or_else(|| NoSuchPrincipal {
        setting,
        file,
        name: name.to_owned(),
    })
}

/// The third field of the line that begins with `name`: so it is in both files.
fn id_in(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let of_name = fields.next() == Some(name);
        of_name.then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_and_numbers_taken_as_they_are() {
        let text = "root:x:0:\nkv:x:7:\nkvtide:x:998:me,you\nbroken\n";
        assert_eq!(id_in(text, "kvtide"), Some(998));
        assert_eq!(id_in(text, "kvt"), None);
        assert_eq!(id_in(text, "broken"), None);
        assert_eq!(user_id("root"), Ok(0));
        assert_eq!(group_id("65532"), Ok(65532));
    }

    #[test]
    fn an_unknown_name_is_told_with_the_setting_and_the_file() {
        assert_eq!(
            user_id("no-such-user").unwrap_err().to_string(),
            "socket.owner: /etc/passwd has no \"no-such-user\"; create it, or set its number"
        );
    }
}

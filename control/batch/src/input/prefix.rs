//! What a prompt begins with, in 16 bytes: hashes of its first 256, 1024, 4096 and 16384 bytes. Sorted
//! by them, prompts that share a beginning stand together, and among them those that share more.

use serde_json::value::RawValue;

/// Lengths at which prompts are compared, in bytes of their JSON text.
const LEVELS: [usize; 4] = [256, 1024, 4096, 16_384];

/// Hashes of the beginning of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix([u32; LEVELS.len()]);

impl Prefix {
    /// The prefix of a prompt whose `parts` come in this order before the model.
    pub(super) fn of(parts: &[Option<&RawValue>]) -> Prefix {
        let mut hasher = blake3::Hasher::new();
        let mut hashes = [0; LEVELS.len()];
        let mut taken = 0;
        let mut level = 0;
        for part in parts.iter().flatten() {
            let mut rest = part.get().as_bytes();
            while level < LEVELS.len() && !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(LEVELS[level] - taken));
                hasher.update(now);
                taken += now.len();
                rest = later;
                if taken == LEVELS[level] {
                    hashes[level] = digest(&hasher);
                    level += 1;
                }
            }
        }
        // A prompt that ends before a level is compared as a whole.
        let whole = digest(&hasher);
        hashes[level..].fill(whole);
        Prefix(hashes)
    }
}

fn digest(hasher: &blake3::Hasher) -> u32 {
    let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        let raw = RawValue::from_string(format!("\"{text}\"")).unwrap();
        Prefix::of(&[None, Some(&raw)])
    }

    #[test]
    fn prompts_agree_up_to_where_they_part() {
        let system = "s".repeat(5_000);
        let a = prefix(&format!("{system} what is a?"));
        let b = prefix(&format!("{system} what is b?"));
        assert_eq!(a.0[..3], b.0[..3]);
        assert_ne!(a.0[3], b.0[3]);
        assert_ne!(prefix("x").0[0], prefix("y").0[0]);
    }

    #[test]
    fn it_does_not_matter_how_the_prompt_is_cut_into_parts() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let (one, two) = (raw(&"1".repeat(300)), raw(&"2".repeat(1000)));
        let both = raw(&("1".repeat(300) + &"2".repeat(1000)));
        assert_eq!(
            Prefix::of(&[Some(&one), None, Some(&two)]),
            Prefix::of(&[Some(&both)])
        );
    }
}

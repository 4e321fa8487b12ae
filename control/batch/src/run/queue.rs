//! In which order the requests of a batch for one model are sent. Pure.
//!
//! A request that has failed goes to the back: it is sent again once all others were sent. One for
//! which nobody was there waits, besides, until another request for the model was answered since, so
//! that what it then meets is its own doing and counts, and a model that is down costs no attempts.
//! Where no request is left whose answer would show that, one that was answered before is asked
//! again; and only where there is none either, the one that has failed.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::time::Instant;

use crate::input::Entry;
use crate::run::pace::Against;
use crate::run::retry::{Failures, Verdict};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Queue {
    fresh: VecDeque<Entry>,
    /// Requests that can be sent again, by when.
    again: BTreeMap<(Instant, u32), Failed>,
    /// Requests for which nobody was there, and that no answer has cleared since; in the order in which
    /// they failed, which is that in which they are cleared.
    doubtful: VecDeque<Failed>,
    witness: Option<Witness>,
    /// How the witness has fared since it was last answered.
    witness_failures: Option<Failures>,
    probe: Probe,
    in_flight: usize,
    draws: u64,
}

#[derive(Clone, Copy, Debug)]
struct Failed {
    entry: Entry,
    failures: Failures,
    due: Instant,
}

/// A request that was answered, and what that has cost, in tokens.
#[derive(Clone, Copy, Debug)]
struct Witness {
    entry: Entry,
    tokens: u64,
}

impl Witness {
    /// What counts: of answers that say nothing of tokens, the one to the shortest request.
    fn cost(&self) -> (u64, u32) {
        (self.tokens, self.entry.bytes)
    }
}

/// Whether somebody is asking for the sake of those in doubt.
#[derive(Clone, Copy, Debug)]
enum Probe {
    Idle,
    UnderWay,
    /// It has failed; not again before this.
    Rests(Instant),
}

/// What is known when the next request is chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outlook {
    pub(super) now: Instant,
    /// Requests for the model that were answered so far.
    pub(super) answers: u64,
    /// Whether nobody is there, as far as is known.
    pub(super) is_down: bool,
    /// Whether it is no more waited for that somebody is.
    pub(super) gave_up: bool,
}

/// Why a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// It was not sent before.
    First,
    /// It has failed, and might not again.
    Again,
    /// It has failed, and no other could show whether anybody is there.
    Alone,
    /// Its answer is there already: this one only shows whether anybody is.
    Witness,
}

/// A request to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sending {
    pub(super) entry: Entry,
    pub(super) failures: Failures,
    pub(super) purpose: Purpose,
}

impl Sending {
    /// What it speaks against if this comes of it.
    pub(super) fn against(&self, verdict: Verdict) -> Against {
        let is_first_429 = verdict == Verdict::Overloaded && self.failures.overloads() == 0;
        match self.purpose {
            // That may come of how much was sent beside it, however it failed before.
            Purpose::Again if is_first_429 => Against::Upstream,
            Purpose::Again => Against::Request,
            Purpose::First | Purpose::Alone | Purpose::Witness => Against::Upstream,
        }
    }
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A request can be sent.
    Send,
    /// Nothing, before this or before one that is under way has ended.
    Wait(Option<Instant>),
    /// All have ended.
    Nothing,
}

/// What is sent next.
enum Choice {
    Fresh,
    Again,
    Witness(Entry),
    Alone(usize),
    None(Next),
}

impl Queue {
    /// Of these, some have `failed` before, by their lines.
    pub(super) fn new(
        entries: Vec<Entry>,
        mut failed: HashMap<u32, Failures>,
        now: Instant,
    ) -> Queue {
        let mut fresh = VecDeque::with_capacity(entries.len());
        let mut again = BTreeMap::new();
        for entry in entries {
            let Some(failures) = failed.remove(&entry.line) else {
                fresh.push_back(entry);
                continue;
            };
            let failed = Failed {
                entry,
                failures,
                due: now,
            };
            again.insert(failed.key(), failed);
        }
        Queue {
            fresh,
            again,
            doubtful: VecDeque::new(),
            witness: None,
            witness_failures: None,
            probe: Probe::Idle,
            in_flight: 0,
            draws: 0,
        }
    }

    /// Requests that wait to be sent again.
    pub(super) fn to_repeat(&self) -> usize {
        self.again.len() + self.doubtful.len()
    }

    /// How often they have failed, by their lines.
    pub(super) fn failures(&self) -> HashMap<u32, Failures> {
        let failed = self.again.values().chain(&self.doubtful);
        failed
            .map(|failed| (failed.entry.line, failed.failures))
            .collect()
    }

    pub(super) fn next(&mut self, outlook: &Outlook) -> Next {
        match self.choose(outlook) {
            Choice::None(next) => next,
            _ => Next::Send,
        }
    }

    /// The next request, if one can be sent now. It is under way until [`Queue::ended`].
    pub(super) fn take(&mut self, outlook: &Outlook) -> Option<Sending> {
        let sending = match self.choose(outlook) {
            Choice::Fresh => {
                // What fails often lies together, for its prompts are alike: a probe is drawn from
                // anywhere.
                let position = if outlook.is_down { self.draw() } else { 0 };
                Sending {
                    entry: self.fresh.remove(position)?,
                    failures: Failures::new(outlook.answers),
                    purpose: Purpose::First,
                }
            }
            Choice::Again => {
                let (_, failed) = self.again.pop_first()?;
                failed.sent_for(Purpose::Again)
            }
            Choice::Witness(entry) => {
                self.probe = Probe::UnderWay;
                let failures = self.witness_failures;
                Sending {
                    entry,
                    failures: failures.unwrap_or_else(|| Failures::new(outlook.answers)),
                    purpose: Purpose::Witness,
                }
            }
            Choice::Alone(position) => {
                self.probe = Probe::UnderWay;
                self.doubtful.remove(position)?.sent_for(Purpose::Alone)
            }
            Choice::None(_) => return None,
        };
        self.in_flight += 1;
        Some(sending)
    }

    /// A request has its result, well or not. One that was answered well can be a witness; the
    /// cheapest is.
    pub(super) fn ended(&mut self, sending: &Sending, tokens_of_answer: Option<u64>) {
        self.returned(sending, Probe::Idle);
        if sending.purpose == Purpose::Witness {
            self.witness_failures = None;
        }
        let Some(tokens) = tokens_of_answer else {
            return;
        };
        let entry = sending.entry;
        let new = Witness { entry, tokens };
        if self.witness.is_none_or(|old| new.cost() < old.cost()) {
            self.witness = Some(new);
        }
    }

    /// A request has failed and is to be sent again, not before it is `due`.
    pub(super) fn failed(&mut self, sending: &Sending, failures: Failures, due: Instant) {
        self.returned(sending, Probe::Rests(due));
        if sending.purpose == Purpose::Witness {
            self.witness_failures = Some(failures);
            return;
        }
        let failed = Failed {
            entry: sending.entry,
            failures,
            due,
        };
        if failures.is_doubtful() {
            self.doubtful.push_back(failed);
        } else {
            self.again.insert(failed.key(), failed);
        }
    }

    fn returned(&mut self, sending: &Sending, probe: Probe) {
        self.in_flight -= 1;
        if matches!(sending.purpose, Purpose::Witness | Purpose::Alone) {
            self.probe = probe;
        }
    }

    fn choose(&mut self, outlook: &Outlook) -> Choice {
        if !self.fresh.is_empty() {
            return Choice::Fresh;
        }
        self.clear(outlook);
        let again_at = self.again.first_key_value().map(|(key, _)| key.0);
        if again_at.is_some_and(|due| due <= outlook.now) {
            return Choice::Again;
        }
        let doubtful = self.doubtful.iter().enumerate();
        let first = doubtful.min_by_key(|(_, failed)| failed.due);
        let Some((position, first)) = first else {
            let is_over = again_at.is_none() && self.in_flight == 0;
            return Choice::None(if is_over {
                Next::Nothing
            } else {
                Next::Wait(again_at)
            });
        };
        let probe_at = match self.probe {
            Probe::UnderWay => return Choice::None(Next::Wait(again_at)),
            Probe::Idle => first.due,
            Probe::Rests(until) => first.due.max(until),
        };
        if probe_at > outlook.now {
            let until = again_at.map_or(probe_at, |at| at.min(probe_at));
            return Choice::None(Next::Wait(Some(until)));
        }
        match self.witness {
            Some(witness) => Choice::Witness(witness.entry),
            None => Choice::Alone(position),
        }
    }

    /// Whoever is not in doubt any more can be sent again.
    fn clear(&mut self, outlook: &Outlook) {
        while let Some(first) = self.doubtful.front()
            && (outlook.gave_up || first.failures.is_clear(outlook.answers))
            && let Some(first) = self.doubtful.pop_front()
        {
            self.again.insert(first.key(), first);
        }
    }

    /// A position among the fresh; any, with about the same probability.
    fn draw(&mut self) -> usize {
        // Knuth's multiplier: the upper bits are as good as random for this.
        self.draws = self.draws.wrapping_add(1);
        let random = self.draws.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        usize::try_from(random).unwrap_or(0) % self.fresh.len().max(1)
    }
}

impl Failed {
    fn key(&self) -> (Instant, u32) {
        (self.due, self.entry.line)
    }

    fn sent_for(self, purpose: Purpose) -> Sending {
        Sending {
            entry: self.entry,
            failures: self.failures,
            purpose,
        }
    }
}

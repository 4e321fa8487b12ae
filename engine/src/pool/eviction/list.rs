//! Queues of slots that cost eight bytes a slot and no allocation.

const NONE: u32 = u32::MAX;

/// Neighbours of every slot, shared by all queues: a slot is in at most one.
#[derive(Debug)]
pub(super) struct Links(Box<[(u32, u32)]>);

impl Links {
    pub(super) fn new(slots: u32) -> Self {
        Self(vec![(NONE, NONE); slots as usize].into_boxed_slice())
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

/// A queue: slots enter at the head and leave at the tail, or from the middle.
#[derive(Debug)]
pub(super) struct Queue {
    head: u32,
    tail: u32,
    len: usize,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Self {
            head: NONE,
            tail: NONE,
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push_head(&mut self, links: &mut Links, slot: u32) {
        links.0[slot as usize] = (NONE, self.head);
        match self.head {
            NONE => self.tail = slot,
            head => links.0[head as usize].0 = slot,
        }
        self.head = slot;
        self.len += 1;
    }

    pub(super) fn pop_tail(&mut self, links: &mut Links) -> Option<u32> {
        (self.tail != NONE).then(|| {
            let slot = self.tail;
            self.unlink(links, slot);
            slot
        })
    }

    /// Removes `slot`, which is in this queue.
    pub(super) fn unlink(&mut self, links: &mut Links, slot: u32) {
        let (before, after) = links.0[slot as usize];
        match before {
            NONE => self.head = after,
            before => links.0[before as usize].1 = after,
        }
        match after {
            NONE => self.tail = before,
            after => links.0[after as usize].0 = before,
        }
        self.len -= 1;
    }
}

//! Which connections there are. When there are as many as there may be, one on which nothing is asked
//! makes room for the next: whoever connects and says nothing shuts nobody out.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    table: Mutex<Table>,
    /// A place may have become free.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    /// Counts what happens: says who was here first.
    now: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    peer: IpAddr,
    /// Since when nothing is asked on it; none while something is answered.
    idle_since: Option<u64>,
    close: CancellationToken,
}

/// A connection's place, and how to tell what happens on it.
#[derive(Debug)]
pub(super) struct Connection {
    all: Arc<Connections>,
    id: u64,
    /// It has to make room.
    pub(super) close: CancellationToken,
}

/// As long as it exists, something is asked or answered on the connection.
#[derive(Debug)]
pub(super) struct Busy(Arc<Connection>);

impl Connections {
    pub(super) fn new(most: usize) -> Arc<Connections> {
        Arc::new(Connections {
            most,
            table: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Waits until there is room, or makes some.
    pub(super) async fn room(&self) {
        loop {
            let changed = self.changed.notified();
            if self.lock().make_room(self.most) {
                return;
            }
            changed.await;
        }
    }

    /// Closes a connection on which nothing is asked, if there is one: file descriptors are short.
    pub(super) fn close_one(&self) {
        self.lock().close_one();
    }

    /// Enters a connection.
    pub(super) fn enter(self: &Arc<Connections>, peer: IpAddr) -> Arc<Connection> {
        let close = CancellationToken::new();
        let id = self.lock().enter(peer, close.clone());
        Arc::new(Connection {
            all: Arc::clone(self),
            id,
            close,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn enter(&mut self, peer: IpAddr, close: CancellationToken) -> u64 {
        self.now += 1;
        let entry = Entry {
            peer: network(peer),
            idle_since: Some(self.now),
            close,
        };
        self.entries.insert(self.now, entry);
        self.now
    }

    fn make_room(&mut self, most: usize) -> bool {
        self.entries.len() < most || self.close_one()
    }

    /// Closes the connection that is idle for the longest time among those of the peer with the most
    /// connections.
    fn close_one(&mut self) -> bool {
        let mut of_peer: HashMap<IpAddr, usize> = HashMap::new();
        for entry in self.entries.values() {
            *of_peer.entry(entry.peer).or_default() += 1;
        }
        let idle = self.entries.iter().filter_map(|(&id, entry)| {
            let since = entry.idle_since?;
            let count = of_peer.get(&entry.peer).copied().unwrap_or_default();
            Some((count, std::cmp::Reverse(since), id))
        });
        let Some((_, _, id)) = idle.max() else {
            return false;
        };
        if let Some(entry) = self.entries.remove(&id) {
            entry.close.cancel();
        }
        true
    }

    fn set_idle(&mut self, id: u64, is_idle: bool) {
        self.now += 1;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.idle_since = is_idle.then_some(self.now);
        }
    }
}

impl Connection {
    /// A request has been read.
    pub(super) fn busy(self: &Arc<Connection>) -> Busy {
        self.all.lock().set_idle(self.id, false);
        Busy(Arc::clone(self))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.all.lock().set_idle(self.0.id, true);
        self.0.all.changed.notify_one();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.lock().entries.remove(&self.id);
        self.all.changed.notify_one();
    }
}

/// Whose connections are counted together: who has an IPv6 address has a whole network of them.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(network))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[tokio::test]
    async fn who_says_nothing_makes_room_first_of_him_with_the_most_connections() {
        let all = Connections::new(4);
        let one = all.enter(peer(1));
        let many = [2, 2, 2].map(|n| all.enter(peer(n)));
        let working = many[0].busy();
        all.room().await;
        let closed = |connection: &Arc<Connection>| connection.close.is_cancelled();
        assert!(closed(&many[1]), "the oldest that does nothing");
        assert!(!closed(&many[0]) && !closed(&many[2]) && !closed(&one));
        let _next = all.enter(peer(3));
        drop(working);
        all.room().await;
        assert!(closed(&many[2]), "the other has worked since");
        assert!(!closed(&many[0]));
    }

    #[tokio::test]
    async fn where_all_work_the_next_waits_for_one_to_end() {
        let all = Connections::new(2);
        let two = [1, 2].map(|n| all.enter(peer(n)));
        let busy: Vec<Busy> = two.iter().map(Connection::busy).collect();
        let waiting = tokio::spawn({
            let all = Arc::clone(&all);
            async move { all.room().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(busy);
        waiting.await.unwrap();
        assert!(two.iter().any(|one| one.close.is_cancelled()));
    }

    #[test]
    fn a_connection_that_ends_leaves_its_place() {
        let all = Connections::new(2);
        drop(all.enter(peer(1)));
        assert!(all.lock().entries.is_empty());
    }

    #[test]
    fn a_network_of_addresses_is_one_peer() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:0:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}

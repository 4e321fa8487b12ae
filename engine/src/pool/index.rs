//! Which slot holds which block.

use hashbrown::HashTable;
use kvtide_model::BlockKey;

use super::sessions::NamespaceNumber;

/// Maps keys to slots. Keys are kept once, in a table by slot, so an entry costs 16 bytes for its
/// key, 4 for its namespace and at most 11 for its place in the hash table.
#[derive(Debug)]
pub(crate) struct Index {
    table: HashTable<u32>,
    keys: Box<[BlockKey]>,
    namespaces: Box<[NamespaceNumber]>,
}

impl Index {
    pub(crate) fn new(slots: u32) -> Self {
        let none = BlockKey::from_bytes([0; 16]);
        Self {
            table: HashTable::with_capacity(slots as usize),
            keys: vec![none; slots as usize].into_boxed_slice(),
            namespaces: vec![NamespaceNumber::default(); slots as usize].into_boxed_slice(),
        }
    }

    /// The slot of `key`.
    pub(crate) fn find(&self, key: BlockKey) -> Option<u32> {
        self.table
            .find(key.table_hash(), |&slot| self.keys[slot as usize] == key)
            .copied()
    }

    /// Enters `key` of `namespace`, which is not in the index, at `slot`.
    pub(super) fn insert(&mut self, key: BlockKey, namespace: NamespaceNumber, slot: u32) {
        self.keys[slot as usize] = key;
        self.namespaces[slot as usize] = namespace;
        let keys = &self.keys;
        self.table
            .insert_unique(key.table_hash(), slot, |&s| keys[s as usize].table_hash());
    }

    /// Removes the entry of `slot`, if there is one; returns its key.
    pub(crate) fn remove_slot(&mut self, slot: u32) -> Option<BlockKey> {
        let key = self.keys[slot as usize];
        let entry = self
            .table
            .find_entry(key.table_hash(), |&s| s == slot)
            .ok()?;
        entry.remove();
        Some(key)
    }

    /// The key last entered at `slot`.
    pub(crate) fn key_of(&self, slot: u32) -> BlockKey {
        self.keys[slot as usize]
    }

    /// The namespace of the key last entered at `slot`.
    pub(super) fn namespace_of(&self, slot: u32) -> NamespaceNumber {
        self.namespaces[slot as usize]
    }

    /// Takes out all entries of `namespace`; the slots that they were at.
    pub(super) fn remove_namespace(&mut self, namespace: NamespaceNumber) -> Vec<u32> {
        let namespaces = &self.namespaces;
        let of_it = |slot: &mut u32| namespaces[*slot as usize] == namespace;
        self.table.extract_if(of_it).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes this index has allocated.
    pub(crate) fn allocated_bytes(&self) -> usize {
        self.table.allocation_size() + size_of_val(&*self.keys) + size_of_val(&*self.namespaces)
    }
}

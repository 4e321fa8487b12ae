//! Messages of every kind, with anything in them that they may have.

use kvtide_model::wire::{
    Answer, Ask, BeginSaves, Bye, ChainSaves, ChainToSave, Clear, Cleared, Count, Counts, Damaged,
    Event, Events, Geometry, Hello, Place, RefusalCode, Refused, Role, SavesBegun, SessionToken,
    Settle, Tag, ToDaemon, ToEngine, Used, Versions, Welcome,
};
use kvtide_model::{BlockKey, NamespaceId, SlotRef};
use proptest::collection::vec;
use proptest::prelude::*;

fn key() -> impl Strategy<Value = BlockKey> + Clone {
    any::<[u8; 16]>().prop_map(BlockKey::from_bytes)
}

fn keys() -> impl Strategy<Value = Vec<BlockKey>> + Clone {
    vec(key(), 0..12)
}

fn slot() -> impl Strategy<Value = SlotRef> + Clone {
    any::<(u32, u32)>().prop_map(|(slot, generation)| SlotRef { slot, generation })
}

fn slots() -> impl Strategy<Value = Vec<SlotRef>> {
    vec(slot(), 0..12)
}

fn tag() -> impl Strategy<Value = Tag> {
    (1..=u32::MAX).prop_filter_map("0 is no tag", Tag::new)
}

fn token() -> impl Strategy<Value = SessionToken> {
    any::<[u8; 16]>().prop_filter_map("zeros are no token", SessionToken::from_bytes)
}

/// A text of at most `bytes` bytes, half of the time of all that it may have.
fn text(bytes: usize) -> impl Strategy<Value = String> {
    prop_oneof![
        vec(any::<char>(), 0..=bytes / 4).prop_map(String::from_iter),
        Just("x".repeat(bytes)),
    ]
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![
        Just(Role::Scheduler),
        any::<u32>().prop_map(|rank| Role::Worker { rank }),
        Just(Role::Operator),
    ]
}

fn geometry() -> impl Strategy<Value = Geometry> {
    any::<(u32, u32, u64, u32)>().prop_map(|(ranks, layers, layer_bytes, block_tokens)| Geometry {
        ranks,
        layers,
        layer_bytes,
        block_tokens,
    })
}

fn hello() -> impl Strategy<Value = Hello> {
    let texts = (
        text(Hello::LONGEST_ENGINE_ID),
        text(Hello::LONGEST_CLIENT),
        text(Hello::LONGEST_MODEL),
        text(Hello::LONGEST_TENANT),
    );
    let session = (
        proptest::option::of(token()),
        any::<u64>(),
        any::<[u8; 16]>(),
    );
    let rest = (0u16.., geometry(), any::<u16>(), any::<bool>());
    (role(), texts, session, rest).prop_map(|(role, texts, session, rest)| {
        let (engine_id, client, model, tenant) = texts;
        let (token, memory, namespace) = session;
        let (highest, geometry, group, events) = rest;
        Hello {
            versions: Versions::new(1, 0, highest).expect("a range"),
            role,
            engine_id,
            client,
            token,
            memory: memory.try_into().ok(),
            namespace: NamespaceId::from_bytes(namespace),
            model,
            tenant,
            geometry,
            group,
            events,
        }
    })
}

fn chains_to_save() -> impl Strategy<Value = Vec<ChainToSave<'static>>> {
    let chain = (keys(), keys()).prop_map(|(earlier, keys)| ChainToSave {
        earlier: earlier.into(),
        keys: keys.into(),
    });
    vec(chain, 0..6)
}

/// Any message of an engine.
pub(crate) fn to_daemon() -> impl Strategy<Value = ToDaemon<'static>> {
    prop_oneof![
        hello().prop_map(ToDaemon::Hello),
        (tag(), chains_to_save())
            .prop_map(|(tag, chains)| ToDaemon::BeginSaves(BeginSaves { tag, chains })),
        slots().prop_map(|slots| ToDaemon::Used(Used {
            slots: slots.into()
        })),
        keys().prop_map(|keys| ToDaemon::Settle(Settle { keys: keys.into() })),
        slots().prop_map(|slots| ToDaemon::Damaged(Damaged {
            slots: slots.into()
        })),
        tag().prop_map(|tag| ToDaemon::Clear(Clear { tag })),
        Just(ToDaemon::Bye(Bye)),
        (tag(), text(2000)).prop_map(|(tag, json)| ToDaemon::Ask(Ask {
            tag,
            json: json.into()
        })),
    ]
}

fn welcome() -> impl Strategy<Value = Welcome> {
    let identity = (
        any::<u16>(),
        text(Welcome::LONGEST_SERVER),
        any::<[u8; 16]>(),
    );
    let session = (1..=u64::MAX, token(), 0u8..64, any::<bool>());
    let numbers = any::<(u64, u32, u64, u32, u32, u32)>();
    (identity, session, numbers).prop_map(|(identity, session, numbers)| {
        let (minor, server, boot) = identity;
        let (memory, token, session, resumed) = session;
        let (extent_bytes, extents, data_offset, rows_per_extent, buckets, max_keys) = numbers;
        Welcome {
            minor,
            server,
            boot,
            memory: memory.try_into().expect("above 0"),
            token,
            session,
            resumed,
            extent_bytes,
            extents,
            data_offset,
            rows_per_extent,
            buckets,
            max_keys,
        }
    })
}

fn chain_saves() -> impl Strategy<Value = ChainSaves> {
    let place = (any::<u32>(), slot()).prop_map(|(at, slot)| Place { at, slot });
    (any::<u32>(), vec(place, 0..12)).prop_map(|(covered, places)| ChainSaves { covered, places })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        key().prop_map(Event::Stored),
        key().prop_map(Event::Removed),
        Just(Event::Cleared),
    ]
}

fn count() -> impl Strategy<Value = Count<'static>> {
    (text(Count::LONGEST_NAME), any::<u64>()).prop_map(|(name, value)| Count {
        name: name.into(),
        value,
    })
}

fn refused() -> impl Strategy<Value = Refused> {
    (any::<u16>(), text(Refused::LONGEST_MESSAGE))
        .prop_map(|(code, text)| Refused::new(RefusalCode::from_number(code), &text))
}

/// Any message of a daemon.
pub(crate) fn to_engine() -> impl Strategy<Value = ToEngine<'static>> {
    prop_oneof![
        welcome().prop_map(ToEngine::Welcome),
        (tag(), any::<bool>(), vec(chain_saves(), 0..6)).prop_map(|(tag, pressure, chains)| {
            ToEngine::SavesBegun(SavesBegun {
                tag,
                pressure,
                chains,
            })
        }),
        tag().prop_map(|tag| ToEngine::Cleared(Cleared { tag })),
        vec(event(), 0..12).prop_map(|events| ToEngine::Events(Events {
            events: events.into()
        })),
        vec(count(), 0..12).prop_map(|counts| ToEngine::Counts(Counts { counts })),
        (tag(), text(2000)).prop_map(|(tag, json)| ToEngine::Answer(Answer {
            tag,
            json: json.into()
        })),
        refused().prop_map(ToEngine::Refused),
    ]
}

//! Values that are read where they are what they should be and passed over where they are not: what an
//! upstream writes beside its answer is not this program's to judge. Nothing is kept of what is
//! passed over.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A value, if it was one.
#[derive(Debug)]
pub(super) struct Lenient<T>(pub(super) Option<T>);

impl<T> Default for Lenient<T> {
    fn default() -> Lenient<T> {
        Lenient(None)
    }
}

/// What a value may be written as; everything else is none.
pub(super) trait Value: Sized {
    /// As a number.
    fn number(_: u64) -> Option<Self> {
        None
    }

    /// As a string.
    fn text(_: &str) -> Option<Self> {
        None
    }

    /// As an object.
    fn object<'de, A: MapAccess<'de>>(mut fields: A) -> Result<Option<Self>, A::Error> {
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

impl Value for u64 {
    fn number(value: u64) -> Option<u64> {
        Some(value)
    }
}

/// For [`Value::object`]: reads a struct.
pub(super) fn fields<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    fields: A,
) -> Result<Option<T>, A::Error> {
    T::deserialize(MapAccessDeserializer::new(fields)).map(Some)
}

impl<'de, T: Value> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Lenient<T>, D::Error> {
        deserializer.deserialize_any(Any(PhantomData)).map(Lenient)
    }
}

struct Any<T>(PhantomData<T>);

impl<'de, T: Value> Visitor<'de> for Any<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_u64<E>(self, value: u64) -> Result<Option<T>, E> {
        Ok(T::number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Option<T>, E> {
        Ok(T::text(value))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Option<T>, A::Error> {
        T::object(fields)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Option<T>, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }
}

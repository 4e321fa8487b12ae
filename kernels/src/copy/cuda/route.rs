//! Ways from a block to a row and back.

use std::fmt;
use std::str::FromStr;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Copy engines, piece by piece.
    Dma,
    /// Copy engines, row by row, through a buffer on the device, from and to which this many
    /// multiprocessors move bytes at the speed of the device's memory.
    Staged(u32),
    /// Threads, on this many multiprocessors.
    Kernel(u32),
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dma => f.write_str("dma"),
            Self::Staged(blocks) => write!(f, "staged:{blocks}"),
            Self::Kernel(blocks) => write!(f, "kernel:{blocks}"),
        }
    }
}

/// Multiprocessors of each unless they are said. Behind the staging buffer, many for a short time
/// keep less from whoever computes than few for a long time.
pub(super) const STAGED_BLOCKS: u32 = 64;
const KERNEL_BLOCKS: u32 = 16;
/// A device has fewer; a launch has a bound.
const BLOCKS_MAX: u32 = 1024;

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, blocks) = match text.split_once(':') {
            Some((name, count)) => (name, Some(count)),
            None => (text, None),
        };
        let count = |default| match blocks.map(str::parse) {
            None => Ok(default),
            Some(Ok(count)) if (1..=BLOCKS_MAX).contains(&count) => Ok(count),
            Some(_) => Err(format!(
                "{text:?} does not end in 1 to {BLOCKS_MAX} multiprocessors"
            )),
        };
        match (name, blocks) {
            ("dma", None) => Ok(Self::Dma),
            ("staged", _) => count(STAGED_BLOCKS).map(Self::Staged),
            ("kernel", _) => count(KERNEL_BLOCKS).map(Self::Kernel),
            _ => Err(format!(
                "{text:?} is no route; use dma, staged or kernel, the latter two with the \
                 number of multiprocessors behind a colon if it matters"
            )),
        }
    }
}

/// The routes in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routes {
    /// Saves, which go layer by layer.
    pub save: Route,
    /// Async loads, which go by whole rows.
    pub load: Route,
    /// Layered loads.
    pub layered: Route,
    /// Layered loads of many rows that lie apart.
    pub scattered: Route,
}

impl Routes {
    /// Whether this is the route in use for `measured`'s purpose.
    #[must_use]
    pub fn uses(&self, measured: &Measured) -> bool {
        let route = match measured.purpose {
            "save" => self.save,
            "load" => self.load,
            "layered" => self.layered,
            _ => self.scattered,
        };
        route == measured.route
    }
}

/// What a route reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// "save", "load", "layered" or "scattered".
    pub purpose: &'static str,
    /// The route.
    pub route: Route,
    /// Gigabytes per second.
    pub gb_per_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_read_as_it_is_written() {
        for route in [Route::Dma, Route::Staged(8), Route::Kernel(3)] {
            assert_eq!(route.to_string().parse(), Ok(route));
        }
        assert_eq!("kernel".parse(), Ok(Route::Kernel(KERNEL_BLOCKS)));
        assert_eq!("staged".parse(), Ok(Route::Staged(STAGED_BLOCKS)));
    }

    #[test]
    fn what_is_no_route_is_refused_with_what_would_be() {
        for text in ["", "fast", "dma:2", "staged:0", "kernel:x", "kernel:5000"] {
            assert!(text.parse::<Route>().is_err(), "{text:?}");
        }
        let error = "copy".parse::<Route>().unwrap_err();
        assert!(error.contains("use dma, staged or kernel"), "{error}");
    }
}

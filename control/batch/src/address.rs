//! Where a server listens: an address, or a name of this machine.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// As it was said, and the addresses that it stands for.
#[derive(Clone, Debug)]
pub struct ListenAddress {
    said: String,
    address: SocketAddr,
}

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
#[error("it must be ADDRESS:PORT or NAME:PORT, such as 127.0.0.1:8090 or localhost:8090 ({0})")]
pub struct NoAddress(String);

impl ListenAddress {
    /// The address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.said)
    }
}

impl FromStr for ListenAddress {
    type Err = NoAddress;

    /// Resolves a name. Of several addresses it is an IPv4 one, as the client's default is.
    fn from_str(said: &str) -> Result<ListenAddress, NoAddress> {
        let found = said.to_socket_addrs();
        let found: Vec<SocketAddr> = found
            .map_err(|error| NoAddress(error.to_string()))?
            .collect();
        let address = found
            .iter()
            .find(|address| address.is_ipv4())
            .or(found.first())
            .ok_or_else(|| NoAddress("the name has no address".to_owned()))?;
        Ok(ListenAddress {
            said: said.to_owned(),
            address: *address,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_and_what_is_no_address_is_told() {
        let of = |said: &str| said.parse::<ListenAddress>().map(|found| found.address());
        for said in ["localhost:8090", "127.0.0.1:8090", "[::1]:8090"] {
            let address = of(said).unwrap();
            assert!(
                address.ip().is_loopback() && address.port() == 8090,
                "{said}"
            );
        }
        for wrong in ["8090", "localhost", ":port", "127.0.0.1:99999"] {
            let error = of(wrong).unwrap_err().to_string();
            assert!(error.contains("localhost:8090"), "{error}");
        }
    }
}

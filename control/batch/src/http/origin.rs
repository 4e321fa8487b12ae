//! Web pages: a browser lets any page send requests to servers that the browser can reach, under the
//! page's own name if that name's owner lets it resolve to such a server. Where no key is asked for,
//! that would be enough to be obeyed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, header};

/// Which names a server without keys goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// Those of this machine for itself.
    Local,
    /// Any: the operator lets everybody in who can connect.
    Any,
}

/// Why a request comes from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Foreign {
    #[error(
        "This server has no API keys and is for this machine only, and the Host of this request is \
         another name: call it localhost or 127.0.0.1, or start it with --keys or --anonymous."
    )]
    Host,
    #[error(
        "This server has no API keys, and the Origin of this request is another site's page: start \
         it with --keys to let pages of other sites use it."
    )]
    Origin,
}

/// Whether a page of another site has sent a request. What is no browser sends no Origin.
pub(super) fn check(headers: &HeaderMap, uri: &Uri, names: Names) -> Result<(), Foreign> {
    let text = |name| headers.get(name).map(|value| value.to_str());
    let host = match (uri.authority(), text(header::HOST)) {
        (Some(authority), _) => Some(authority.clone()),
        (None, Some(Ok(host))) => Some(host.parse().map_err(|_| Foreign::Host)?),
        (None, Some(Err(_))) => return Err(Foreign::Host),
        // HTTP/1.0, which no browser speaks.
        (None, None) => None,
    };
    if names == Names::Local && host.as_ref().is_some_and(|host| !is_local(host.host())) {
        return Err(Foreign::Host);
    }
    let Some(origin) = text(header::ORIGIN) else {
        return Ok(());
    };
    let origin: Option<Authority> = origin
        .ok()
        .and_then(|origin| origin.parse::<Uri>().ok())
        .and_then(|origin| origin.into_parts().authority);
    match (origin, host) {
        (Some(origin), Some(host)) if origin == host => Ok(()),
        _ => Err(Foreign::Origin),
    }
}

fn is_local(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if let Ok(address) = name.parse::<Ipv4Addr>() {
        return address.is_loopback();
    }
    if let Some(address) = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
    {
        let address = address.parse::<Ipv6Addr>().map(IpAddr::V6);
        return address.is_ok_and(|address| address.to_canonical().is_loopback());
    }
    name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(host: &str, origin: Option<&str>, names: Names) -> Result<(), Foreign> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        check(&headers, &"/v1/files".parse().unwrap(), names)
    }

    #[test]
    fn a_server_of_this_machine_goes_by_its_own_names_only() {
        for host in [
            "localhost:8090",
            "LocalHost",
            "localhost.",
            "a.localhost:1",
            "127.0.0.1:8090",
            "127.1.2.3",
            "[::1]:8090",
            "[::ffff:127.0.0.1]",
        ] {
            assert_eq!(of(host, None, Names::Local), Ok(()), "{host}");
        }
        for host in [
            "attacker.example",
            "localhost.attacker.example:8090",
            "notlocalhost",
            "10.0.0.1",
            "[2001:db8::1]:80",
            "",
            "localhost@attacker.example",
        ] {
            assert_eq!(of(host, None, Names::Local), Err(Foreign::Host), "{host}");
        }
        assert_eq!(of("batch.intranet:8090", None, Names::Any), Ok(()));
    }

    #[test]
    fn pages_of_other_sites_are_told_by_their_origin() {
        let host = "localhost:8090";
        for names in [Names::Local, Names::Any] {
            assert_eq!(of(host, Some("http://localhost:8090"), names), Ok(()));
            for origin in [
                "http://attacker.example",
                "null",
                "",
                "http://localhost:3000",
                "http://localhost",
                "file://",
            ] {
                let found = of(host, Some(origin), names);
                assert_eq!(found, Err(Foreign::Origin), "{origin}");
            }
        }
    }

    #[test]
    fn a_request_without_any_host_is_no_browser_s() {
        let uri = "/healthz".parse().unwrap();
        assert_eq!(check(&HeaderMap::new(), &uri, Names::Local), Ok(()));
        let elsewhere = "http://attacker.example/v1/files".parse().unwrap();
        let found = check(&HeaderMap::new(), &elsewhere, Names::Local);
        assert_eq!(found, Err(Foreign::Host));
    }
}

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::*;

fn settings(
    extra: &str,
    environment: &[(&str, &str)],
    ranks: u32,
) -> Result<Settings, ConfigError> {
    let environment = environment
        .iter()
        .map(|&(name, value)| (name.into(), value.into()))
        .collect();
    let extra = serde_json::from_str(extra).unwrap();
    Config::read(&extra, &environment, ranks, 64 << 30)
}

fn read(extra: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    settings(extra, environment, 1).map(|settings| settings.config)
}

#[test]
fn extra_config_wins_over_kvtide_variables_and_those_over_aibrix_ones() {
    let aibrix = ("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "1");
    let own = ("KVTIDE_HOST_CAPACITY_GB", "2");
    let capacity = |extra, environment: &[(&str, &str)]| {
        read(extra, environment).unwrap().host_capacity_bytes >> 30
    };
    assert_eq!(capacity("{}", &[aibrix]), 1);
    assert_eq!(capacity("{}", &[aibrix, own]), 2);
    assert_eq!(capacity(r#"{"host_capacity_gb": 3}"#, &[aibrix, own]), 3);
    assert_eq!(capacity("{}", &[("HOME", "/root")]), 10);
}

const AIBRIX_CAPACITY: &str = "AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB";
const AIBRIX_EVICTION: &str = "AIBRIX_KV_CACHE_OL_L1_CACHE_EVICTION_POLICY";

#[test]
fn aibrix_eviction_names_are_understood() {
    let policy = |name| settings("{}", &[(AIBRIX_EVICTION, name)], 1);
    for (name, eviction) in [("S3FIFO", Eviction::S3Fifo), ("LRU", Eviction::Lru)] {
        let read = policy(name).unwrap();
        assert_eq!((read.config.eviction, read.notices.len()), (eviction, 0));
    }
    let error = policy("CLOCK").unwrap_err();
    assert_eq!(error.key, AIBRIX_EVICTION);
    assert!(error.to_string().contains("\"FIFO\""), "{error}");
}

#[test]
fn fifo_which_aibrix_has_becomes_lru_with_a_notice() {
    let read = settings("{}", &[(AIBRIX_EVICTION, "FIFO")], 1).unwrap();
    assert_eq!(read.config.eviction, Eviction::Lru);
    assert!(
        read.notices[0].starts_with(AIBRIX_EVICTION),
        "{:?}",
        read.notices
    );
    let error = settings(r#"{"eviction": "fifo"}"#, &[], 1).unwrap_err();
    assert_eq!(error.key, "eviction");
}

#[test]
fn aibrix_counts_capacity_for_each_rank_and_kvtide_for_all() {
    let capacity = |extra, environment: &[(&str, &str)], ranks| {
        let read = settings(extra, environment, ranks).unwrap();
        (read.config.host_capacity_bytes >> 30, read.notices.len())
    };
    let aibrix = (AIBRIX_CAPACITY, "20");
    assert_eq!(capacity("{}", &[aibrix], 1), (20, 0));
    assert_eq!(capacity("{}", &[aibrix], 8), (160, 1));
    assert_eq!(
        capacity("{}", &[("KVTIDE_HOST_CAPACITY_GB", "20")], 8),
        (20, 0)
    );
    assert_eq!(
        capacity(r#"{"host_capacity_gb": 20}"#, &[aibrix], 8),
        (20, 0)
    );
}

#[test]
fn variables_of_aibrix_that_mean_nothing_here_are_named_in_one_notice() {
    let set = [
        ("AIBRIX_KV_CACHE_OL_L2_CACHE_BACKEND", "INFINISTORE"),
        ("AIBRIX_KV_CACHE_OL_L1_CACHE_ENABLED", "0"),
        ("AIBRIX_KV_CACHE_OL_CHUNK_SIZE", ""),
        (AIBRIX_CAPACITY, "20"),
    ];
    let [notice] = &settings("{}", &set, 1).unwrap().notices[..] else {
        panic!("one notice");
    };
    assert!(
        notice.contains("AIBRIX_KV_CACHE_OL_L1_CACHE_ENABLED, AIBRIX_KV_CACHE_OL_L2_CACHE_BACKEND")
    );
    assert!(
        !notice.contains("CHUNK_SIZE") && !notice.contains("CAPACITY"),
        "{notice}"
    );
}

#[test]
fn an_empty_variable_is_as_none() {
    let empty = [
        ("KVTIDE_HOST_CAPACITY_GB", ""),
        ("KVTIDE_EVICTION", ""),
        ("KVTIDE_TENANT", ""),
        (AIBRIX_EVICTION, ""),
    ];
    assert_eq!(read("{}", &empty), read("{}", &[]));
    let behind = [("KVTIDE_HOST_CAPACITY_GB", ""), (AIBRIX_CAPACITY, "3")];
    assert_eq!(read("{}", &behind).unwrap().host_capacity_bytes, 3 << 30);
}

fn read_bytes(name: &str, value: &[u8]) -> Result<Settings, ConfigError> {
    let value = OsString::from_vec(value.to_vec());
    Config::read(
        &Map::new(),
        &BTreeMap::from([(name.into(), value)]),
        1,
        64 << 30,
    )
}

#[test]
fn bytes_that_are_not_utf8_matter_only_in_variables_that_are_read() {
    const LATIN_1: &[u8] = b"\xe9t\xe9";
    let none = read_bytes("GREETING", b"").unwrap();
    assert_eq!(read_bytes("GREETING", LATIN_1).unwrap(), none);
    assert_eq!(read_bytes("KVTIDE_BATCH_DATA", LATIN_1).unwrap(), none);
    assert!(read_bytes("AIBRIX_KV_CACHE_OL_PROFILING_ENABLED", LATIN_1).is_ok());
    for name in ["KVTIDE_TENANT", AIBRIX_CAPACITY] {
        let error = read_bytes(name, LATIN_1).unwrap_err();
        assert_eq!(error.key, name);
        assert!(error.problem.contains("not UTF-8"), "{error}");
    }
    let name = OsString::from_vec(b"KVTIDE_TEN\xe9NT".to_vec());
    let error = Config::read(&Map::new(), &BTreeMap::from([(name, "t".into())]), 1, 1).unwrap_err();
    assert!(error.to_string().contains("did you mean tenant"), "{error}");
}

/// Every name of a variable that the sources in `directory` mention.
fn variables_in(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(variables_in(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split('"').filter(|word| word.starts_with("KVTIDE_"));
            found.extend(names.map(str::to_owned));
        }
    }
    found
}

#[test]
fn variables_of_the_control_plane_and_of_the_daemon_do_not_stop_an_engine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let control = root.join("../control");
    let mut names = variables_in(&control.join("src"));
    for entry in fs::read_dir(control).unwrap() {
        let sources = entry.unwrap().path().join("src");
        if sources.is_dir() {
            names.extend(variables_in(&sources));
        }
    }
    let of_serve = variables_in(&root.join("server/src")).into_iter();
    names.extend(of_serve.filter(|name| name.starts_with("KVTIDE_SERVE_")));
    assert!(
        [
            "KVTIDE_LOG",
            "KVTIDE_BATCH_UPSTREAM",
            "KVTIDE_SERVE_SOCKET_PATH"
        ]
        .iter()
        .all(|name| names.contains(*name)),
        "{names:?}"
    );
    for name in names {
        assert_eq!(read("{}", &[(&name, "x")]), read("{}", &[]), "{name}");
    }
    // Not so what is nearly a setting.
    assert!(read("{}", &[("KVTIDE_LOAD_MODE", "x")]).is_err());
}

#[test]
fn routes_are_compared_without_case() {
    for key in ["gpu_save_route", "gpu_load_route", "gpu_layered_route"] {
        let route = |text: &str| read(&format!(r#"{{"{key}": "{text}"}}"#), &[]);
        for (upper, lower) in [
            ("AUTO", "auto"),
            ("Staged", "staged"),
            ("KERNEL:4", "kernel:4"),
        ] {
            assert_eq!(route(upper).unwrap(), route(lower).unwrap());
        }
        assert_eq!(route("warp").unwrap_err().key, key);
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    let error = read(r#"{"host_capacity": 3}"#, &[])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("host_capacity: ") && error.contains("did you mean host_capacity_gb")
    );
    let error = read("{}", &[("KVTIDE_EVICTON", "lru")])
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("KVTIDE_EVICTON: ") && error.contains("did you mean eviction"));
}

#[test]
fn variables_of_the_test_suite_are_not_settings() {
    assert!(
        read(
            "{}",
            &[("KVTIDE_REQUIRE_CUDA", "1"), ("KVTIDE_CACHE", "/tmp")]
        )
        .is_ok()
    );
}

#[test]
fn variables_that_kubernetes_sets_for_a_service_are_not_settings() {
    for name in [
        "KVTIDE_SERVICE_HOST",
        "KVTIDE_SERVICE_PORT_HTTP",
        "KVTIDE_PORT",
        "KVTIDE_CACHE_PORT_8000_TCP_ADDR",
        "KVTIDE_EXPORTER_PORT",
        "KVTIDE_TRANSPORT_PORT_80_TCP_ADDR",
    ] {
        assert!(read("{}", &[(name, "tcp://10.0.0.1:80")]).is_ok(), "{name}");
    }
    assert!(read("{}", &[("KVTIDE_REPORT", "1")]).is_err());
}

#[test]
fn wrong_values_name_the_key_and_what_is_expected() {
    let wrong = [
        ("pool", "\"tcp:localhost:7\""),
        ("pool", "\"unix:kvtide.sock\""),
        ("host_capacity_gb", "-1"),
        ("host_capacity_gb", "\"many\""),
        ("host_capacity_gb", "1e300"),
        ("eviction", "\"clock\""),
        ("load", "true"),
        ("verify", "\"never\""),
        ("scrub_mib_per_s", "-2"),
        ("save_generated", "\"maybe\""),
        ("lease_ms", "0"),
        ("join_timeout_ms", "1.5"),
        ("load_timeout_ms", "0"),
        ("tenant", "7"),
        ("segment_directory", "\"/no/such/place\""),
        ("huge_pages", "\"yes\""),
        ("codec", "\"fp4\""),
        ("gpu_save_route", "\"warp\""),
        ("gpu_load_route", "\"kernel:0\""),
        ("gpu_layered_route", "4"),
        ("weights_revision", "7"),
    ];
    for setting in SETTINGS {
        assert!(
            wrong.iter().any(|(key, _)| *key == setting.key),
            "{}",
            setting.key
        );
    }
    for (key, value) in wrong {
        let error = read(&format!("{{\"{key}\": {value}}}"), &[]).unwrap_err();
        assert_eq!(error.key, key);
        assert!(error.fix.starts_with("set it to "), "{error}");
    }
}

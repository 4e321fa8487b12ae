//! The files under `control/deploy/serve` fit to the daemon, and their parts to each other.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvtide_server::config::{Config, Settings, Sources};
use serde::Deserialize as _;
use serde_json::Value;

const GIB: u64 = 1 << 30;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../control/deploy/serve")
}

fn text(name: &str) -> String {
    fs::read_to_string(folder().join(name)).unwrap()
}

fn read(text: &str) -> Config {
    let settings = Settings::read(&Sources {
        file: Some((Path::new("kvtide.toml"), text)),
        environment: &BTreeMap::new(),
        arguments: &[],
        available_bytes: Some(1 << 40),
    });
    settings.unwrap().config
}

fn manifests() -> Vec<Value> {
    let text = text("daemonset.yaml");
    let documents = serde_norway::Deserializer::from_str(&text);
    documents
        .map(|document| Value::deserialize(document).unwrap())
        .collect()
}

fn of_kind(kind: &str) -> Value {
    let manifests = manifests();
    manifests
        .into_iter()
        .find(|manifest| manifest["kind"] == kind)
        .unwrap()
}

fn bytes(quantity: &Value) -> u64 {
    let gib = quantity.as_str().unwrap().strip_suffix("Gi").unwrap();
    gib.parse::<u64>().unwrap() * GIB
}

/// The element of a list that has this name.
fn named<'a>(list: &'a Value, name: &str) -> &'a Value {
    let mut list = list.as_array().unwrap().iter();
    list.find(|element| element["name"] == name).unwrap()
}

#[test]
fn the_pod_has_no_rights_beyond_its_users() {
    let spec = &of_kind("DaemonSet")["spec"]["template"]["spec"];
    for field in ["hostIPC", "hostPID", "hostNetwork"] {
        assert!(spec[field].is_null(), "{field}");
    }
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    let context = &named(&spec["containers"], "kvtide")["securityContext"];
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["capabilities"]["drop"][0], "ALL");
    assert!(context["privileged"].is_null() && context["capabilities"]["add"].is_null());
}

#[test]
fn the_pod_has_room_time_and_places_for_what_is_configured() {
    let map = of_kind("ConfigMap");
    let config = read(map["data"]["kvtide.toml"].as_str().unwrap());
    let spec = &of_kind("DaemonSet")["spec"]["template"]["spec"];
    let container = named(&spec["containers"], "kvtide");
    let capacity = config.memory.capacity_bytes;
    let limit = bytes(&container["resources"]["limits"]["memory"]);
    assert!(
        limit >= capacity + capacity / 10,
        "the capacity and a tenth more"
    );
    assert_eq!(limit, bytes(&container["resources"]["requests"]["memory"]));
    let memory = named(&spec["volumes"], "memory");
    assert!(bytes(&memory["emptyDir"]["sizeLimit"]) > capacity);
    assert!(limit > bytes(&memory["emptyDir"]["sizeLimit"]));
    let mounted = |name: &str| {
        let mount = named(&container["volumeMounts"], name)["mountPath"].as_str();
        PathBuf::from(mount.unwrap())
    };
    assert_eq!(config.memory.directory, mounted("memory"));
    assert_eq!(config.socket.path.parent().unwrap(), mounted("socket"));
    let port = named(&container["ports"], "http")["containerPort"].as_u64();
    assert_eq!(
        port,
        config.http_listen.map(|address| address.port().into())
    );
    assert!(
        config.http_listen.unwrap().ip().is_unspecified(),
        "probes come from outside"
    );
    let granted = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(granted > config.grace.as_secs() + 2);
    let arguments = container["args"].as_array().unwrap();
    assert_eq!(arguments[2], "/etc/kvtide/kvtide.toml");
    assert_eq!(mounted("configuration"), Path::new("/etc/kvtide"));
}

#[test]
fn the_old_daemon_ends_before_the_new_one_starts() {
    let update = &of_kind("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!(
        (
            update["maxSurge"].as_u64(),
            update["maxUnavailable"].as_u64()
        ),
        (Some(0), Some(1))
    );
}

#[test]
fn the_units_agree_with_the_configuration_beside_them() {
    let config = read(&text("kvtide.toml"));
    let socket = text("kvtide.socket");
    let listens = format!("ListenStream={}\n", config.socket.path.display());
    assert!(socket.contains(&listens));
    assert!(socket.contains(&format!("SocketMode={:04o}\n", config.socket.mode)));
    let service = text("kvtide.service");
    let stop = service
        .lines()
        .find_map(|line| line.strip_prefix("TimeoutStopSec="));
    assert!(stop.unwrap().parse::<u64>().unwrap() > config.grace.as_secs() + 2);
    assert!(service.contains("RestartPreventExitStatus=2\n"));
}

#[test]
fn systemd_understands_the_units() {
    let place = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_kvtide");
    for name in ["kvtide.service", "kvtide.socket"] {
        let unit = text(name).replace("/usr/bin/kvtide", program);
        fs::write(place.path().join(name), unit).unwrap();
    }
    let mut command = Command::new("systemd-analyze");
    command.args([
        "verify",
        "--man=no",
        "--recursive-errors=no",
        "kvtide.service",
        "kvtide.socket",
    ]);
    match command
        .current_dir(place.path())
        .env("SYSTEMD_UNIT_PATH", place.path())
        .output()
    {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && !said.contains("kvtide."),
                "{said}"
            );
        }
        Err(_) => eprintln!("SKIPPED: there is no systemd-analyze here"),
    }
}

//! Crates import one way: {model, segment} ← kernels ← engine ← {connector, server}; in control
//! api ← {core, kube} ← reconcile, and base ← every server.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

fn workspace() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata")
}

#[test]
fn every_crate_imports_only_what_lies_below_it() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("kvtide-model", &[][..]),
        ("kvtide-segment", &[][..]),
        ("kvtide-kernels", &["kvtide-segment"][..]),
        (
            "kvtide-engine",
            &["kvtide-model", "kvtide-segment", "kvtide-kernels"][..],
        ),
        (
            "kvtide-connector",
            &[
                "kvtide-model",
                "kvtide-segment",
                "kvtide-kernels",
                "kvtide-engine",
            ][..],
        ),
        (
            "kvtide-server",
            &["kvtide-model", "kvtide-segment", "kvtide-engine"][..],
        ),
        ("kvtide-control-base", &[][..]),
        ("kvtide-control-api", &[][..]),
        ("kvtide-control-core", &["kvtide-control-api"][..]),
        ("kvtide-control-kube", &["kvtide-control-api"][..]),
        (
            "kvtide-control-reconcile",
            &[
                "kvtide-control-api",
                "kvtide-control-core",
                "kvtide-control-kube",
            ][..],
        ),
        ("kvtide-control-batch", &["kvtide-control-base"][..]),
        (
            "kvtide-control",
            &[
                "kvtide-control-api",
                "kvtide-control-base",
                "kvtide-control-batch",
                "kvtide-control-core",
                "kvtide-control-kube",
                "kvtide-control-reconcile",
            ][..],
        ),
        (
            "kvtide-bench",
            &[
                "kvtide-model",
                "kvtide-segment",
                "kvtide-kernels",
                "kvtide-engine",
            ][..],
        ),
    ]);
    let metadata = workspace();
    let names: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        allowed.keys().copied().collect(),
        "say here what a new crate may import"
    );
    for package in &metadata.packages {
        for dependency in &package.dependencies {
            let ours = names.contains(dependency.name.as_str());
            if ours && dependency.kind != DependencyKind::Development {
                assert!(
                    allowed[package.name.as_str()].contains(&dependency.name.as_str()),
                    "{} must not import {}",
                    package.name,
                    dependency.name
                );
            }
        }
    }
}

/// External crates that only some of ours may use, because each stands for a world of its own: the
/// GPU, Python, an asynchronous runtime, Kubernetes.
const CONFINED: &[(&str, &[&str])] = &[
    ("cudarc", &["kvtide-kernels"]),
    ("pyo3", &["kvtide-connector"]),
    (
        "tokio",
        &[
            "kvtide-control",
            "kvtide-control-base",
            "kvtide-control-batch",
            "kvtide-control-kube",
            "kvtide-control-reconcile",
            "kvtide-server",
        ],
    ),
    (
        "kube",
        &[
            "kvtide-control",
            "kvtide-control-kube",
            "kvtide-control-reconcile",
        ],
    ),
    (
        "k8s-openapi",
        &[
            "kvtide-control",
            "kvtide-control-api",
            "kvtide-control-core",
            "kvtide-control-kube",
            "kvtide-control-reconcile",
        ],
    ),
];

#[test]
fn worlds_of_their_own_are_met_in_one_place_each() {
    let metadata = workspace();
    for (external, users) in CONFINED {
        let importers: BTreeSet<&str> = metadata
            .packages
            .iter()
            .filter(|package| {
                let mut dependencies = package.dependencies.iter();
                dependencies.any(|d| d.name == *external && d.kind == DependencyKind::Normal)
            })
            .map(|package| package.name.as_str())
            .collect();
        assert_eq!(importers, users.iter().copied().collect(), "of {external}");
    }
}

/// What a crate of ours is built with, of its own and through the crates of ours below it.
fn reached<'a>(metadata: &'a Metadata, from: &'a str) -> BTreeSet<&'a str> {
    let (mut found, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(name) = open.pop() {
        let package = metadata.packages.iter().find(|p| p.name.as_str() == name);
        let dependencies = package.into_iter().flat_map(|p| &p.dependencies);
        for dependency in dependencies.filter(|d| d.kind == DependencyKind::Normal) {
            if found.insert(dependency.name.as_str()) {
                open.push(&dependency.name);
            }
        }
    }
    found
}

/// What does I/O, on a network or a disk: tokio and all that is built on it.
const INPUT_AND_OUTPUT: &[&str] = &[
    "axum",
    "futures",
    "hyper",
    "kube",
    "object_store",
    "reqwest",
    "rusqlite",
    "rustix",
    "tokio",
    "tokio-postgres",
];
/// Kubernetes, its types included.
const KUBERNETES: &[&str] = &["k8s-openapi", "kube", "kube-core", "kube-derive"];

/// What the crates of the control plane must not be built with, however they would come to it.
const NEVER: &[(&str, &[&str])] = &[
    ("kvtide-control-api", INPUT_AND_OUTPUT),
    ("kvtide-control-core", INPUT_AND_OUTPUT),
    ("kvtide-control-base", KUBERNETES),
    ("kvtide-control-batch", KUBERNETES),
    ("kvtide-control-kube", &["axum", "object_store", "rusqlite"]),
    (
        "kvtide-control-reconcile",
        &["axum", "object_store", "rusqlite"],
    ),
];

#[test]
fn a_world_is_not_met_through_a_crate_in_between_either() {
    let metadata = workspace();
    for (name, never) in NEVER {
        let reached = reached(&metadata, name);
        assert!(!reached.is_empty(), "there is no crate {name}");
        let met: Vec<_> = never.iter().filter(|n| reached.contains(**n)).collect();
        assert!(met.is_empty(), "{name} is built with {met:?}");
    }
}

#[test]
fn the_control_plane_has_no_part_of_the_engine() {
    let metadata = workspace();
    let reached = reached(&metadata, "kvtide-control");
    let engine = [
        "kvtide-engine",
        "kvtide-kernels",
        "kvtide-segment",
        "cudarc",
    ];
    let met: Vec<_> = engine.iter().filter(|n| reached.contains(**n)).collect();
    assert!(met.is_empty(), "{met:?}");
}

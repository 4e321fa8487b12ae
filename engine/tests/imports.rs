//! Crates import one way: {model, segment} ← kernels ← engine ← {connector, server}, and
//! model ← control.

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

//! Crates import one way: {model, segment} ← kernels ← engine ← connector, and model ← control.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

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
        ("kvtide-control", &["kvtide-model"][..]),
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
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
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

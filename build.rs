//! Compiles `kernels/cuda` with nvcc into one fat binary, which the crate `kvtide-kernels` embeds.
//!
//! nvcc is looked for in `NVCC`, `CUDA_HOME`, `CUDA_PATH` and `PATH`. Without one the crate is built
//! without kernels and refuses GPUs at run time; `KVTIDE_REQUIRE_CUDA=1` makes that an error.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for Ampere (and Ada), Hopper and Blackwell, and PTX from which a driver compiles for
/// what comes after them. The PTX is Hopper's: from an older one's, fp8 would be converted in software.
const TARGETS: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90,code=sm_90",
    "arch=compute_100,code=sm_100",
    "arch=compute_90,code=compute_90",
];

fn main() -> Result<(), Box<dyn Error>> {
    let sources = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("cuda");
    println!("cargo::rerun-if-changed=../build.rs");
    println!("cargo::rerun-if-changed={}", sources.display());
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "KVTIDE_REQUIRE_CUDA"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let Some(nvcc) = find_nvcc() else {
        if env::var("KVTIDE_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            return Err(
                "KVTIDE_REQUIRE_CUDA=1, but no nvcc in NVCC, CUDA_HOME, CUDA_PATH or PATH".into(),
            );
        }
        return Ok(());
    };
    compile(&nvcc, &sources.join("kernels.cu"))?;
    println!("cargo::rustc-cfg=kvtide_cuda_kernels");
    Ok(())
}

fn find_nvcc() -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let in_homes = homes.map(|home| Path::new(&home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path: Vec<PathBuf> = env::split_paths(&path)
        .map(|folder| folder.join("nvcc"))
        .collect();
    named
        .into_iter()
        .chain(in_homes)
        .chain(in_path)
        .find(|candidate| candidate.is_file())
}

fn compile(nvcc: &Path, source: &Path) -> Result<(), Box<dyn Error>> {
    let target = Path::new(&env::var("OUT_DIR")?).join("kernels.fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "-Werror", "all-warnings"]);
    for code in TARGETS {
        command.args(["-gencode", code]);
    }
    let output = command.arg("-o").arg(&target).arg(source).output()?;
    if !output.status.success() {
        let log = [output.stdout, output.stderr].concat();
        return Err(format!("{command:?} failed:\n{}", String::from_utf8_lossy(&log)).into());
    }
    Ok(())
}

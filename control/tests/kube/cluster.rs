//! A real API server with etcd and garbage collection on loopback, one for all tests of the process.
//!
//! Every process is started under `setpriv --pdeathsig`, so the kernel ends it with the tests, also
//! when those are killed. Files are in a temporary directory.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

/// Directory with etcd, kube-apiserver, kube-controller-manager and kubectl.
const BIN: &str = "KVTIDE_KUBE_BIN";
/// Fail instead of skipping where that is not set.
const REQUIRE: &str = "KVTIDE_REQUIRE_KUBE";
/// The identity that `control/deploy` grants its rights to.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:kvtide-system:kvtide-control";
/// The definitions that `control/deploy` installs.
pub(crate) const CRDS: [&str; 3] = [
    "crd/stormservices.orchestration.aibrix.ai",
    "crd/rolesets.orchestration.aibrix.ai",
    "crd/podsets.orchestration.aibrix.ai",
];
const NAMESPACE: &str = "namespace/kvtide-system";
/// The API server and its controllers take what they are told into use in seconds; garbage collection
/// knows new kinds within half a minute.
const TAKEN_MAX: Duration = Duration::from_secs(90);
/// Starting takes seconds; far beyond that it hangs.
const START_MAX: Duration = Duration::from_secs(120);

/// See the module.
pub(crate) struct Cluster {
    bin: PathBuf,
    home: PathBuf,
    pub(crate) kubeconfig: PathBuf,
    /// For the controller: only what `control/deploy` grants.
    pub(crate) limited_kubeconfig: PathBuf,
    etcd_url: String,
    api_port: u16,
    api_server: Mutex<Child>,
}

static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();

/// The cluster, or none where the test is to be skipped; says so by the test's name.
pub(crate) fn cluster() -> Option<&'static Cluster> {
    let cluster = CLUSTER.get_or_init(|| {
        let Some(bin) = std::env::var_os(BIN) else {
            assert!(
                std::env::var_os(REQUIRE).is_none(),
                "{REQUIRE} is set and {BIN} is not"
            );
            return None;
        };
        // A child dies with the *thread* that started it: this one stays.
        let (done, started) = mpsc::channel();
        std::thread::spawn(move || {
            done.send(Cluster::start(PathBuf::from(bin))).unwrap();
            loop {
                std::thread::park();
            }
        });
        Some(
            started
                .recv()
                .expect("the API server did not start; see the panic above"),
        )
    });
    if cluster.is_none() {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        eprintln!("SKIPPED {name}: {BIN} is not set; run make test-kube");
    }
    cluster.as_ref()
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Starts a program that dies with the thread that called this.
pub(crate) fn spawn(
    program: &Path,
    arguments: &[String],
    log: &Path,
    env: &[(&str, String)],
) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(arguments)
        .envs(env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("setpriv (util-linux) starts the programs")
}

fn arguments(of: &[&str]) -> Vec<String> {
    of.iter().map(ToString::to_string).collect()
}

impl Cluster {
    fn start(bin: PathBuf) -> Self {
        let home = tempfile::Builder::new()
            .prefix("kvtide-kube-")
            .tempdir()
            .unwrap();
        // Removed by the last test's exit only through the temporary directory of the system: the
        // processes outlive this value.
        let home = home.keep();
        remove_when_process_ends(&home);
        let [etcd_port, peer_port, api_port] = [free_port(), free_port(), free_port()];
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let etcd = [
            format!("--data-dir={}", home.join("etcd").display()),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
            "--unsafe-no-fsync".into(),
            "--log-level=error".into(),
        ];
        std::mem::drop(spawn(&bin.join("etcd"), &etcd, &home.join("etcd.log"), &[]));
        fs::write(
            home.join("tokens.csv"),
            format!(
                "admin-token,admin,admin,\"system:masters\"\n\
                 limited-token,{SERVICE_ACCOUNT},limited,\"system:serviceaccounts,\
                 system:serviceaccounts:kvtide-system\"\n"
            ),
        )
        .unwrap();
        fs::write(home.join("audit.yaml"), AUDIT_POLICY).unwrap();
        let api_server = Self::spawn_api_server(&bin, &home, &etcd_url, api_port);
        let cluster = Self {
            kubeconfig: kubeconfig(&home, api_port, "admin"),
            limited_kubeconfig: kubeconfig(&home, api_port, "limited"),
            bin,
            home,
            etcd_url,
            api_port,
            api_server: Mutex::new(api_server),
        };
        cluster.wait_until_ready();
        cluster.install();
        let manager = arguments(&[
            &format!("--kubeconfig={}", cluster.kubeconfig.display()),
            "--controllers=garbagecollector,namespace",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            &format!("--secure-port={}", free_port()),
            &format!("--cert-dir={}", cluster.home.join("kcm").display()),
            "--authentication-skip-lookup=true",
        ]);
        let program = cluster.bin.join("kube-controller-manager");
        std::mem::drop(spawn(
            &program,
            &manager,
            &cluster.home.join("kcm.log"),
            &[],
        ));
        cluster
    }

    fn spawn_api_server(bin: &Path, home: &Path, etcd_url: &str, port: u16) -> Child {
        let path = |name: &str| home.join(name).display().to_string();
        let arguments = arguments(&[
            &format!("--etcd-servers={etcd_url}"),
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            &format!("--secure-port={port}"),
            &format!("--cert-dir={}", path("certs")),
            "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC",
            &format!("--token-auth-file={}", path("tokens.csv")),
            &format!("--service-account-key-file={}", path("sa.key")),
            &format!("--service-account-signing-key-file={}", path("sa.key")),
            &format!("--service-account-issuer=https://127.0.0.1:{port}"),
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
            "--allow-privileged=true",
            // As before Kubernetes 1.36: a Service's name begins with a letter.
            "--feature-gates=RelaxedServiceNameValidation=false",
            &format!("--audit-log-path={}", path("audit.log")),
            &format!("--audit-policy-file={}", path("audit.yaml")),
        ]);
        if !home.join("sa.key").exists() {
            let made = Command::new("openssl")
                .args(["genrsa", "-out"])
                .arg(home.join("sa.key"))
                .arg("2048")
                .output()
                .expect("openssl makes the key of service accounts");
            assert!(made.status.success(), "{made:?}");
        }
        spawn(
            &bin.join("kube-apiserver"),
            &arguments,
            &home.join("apiserver.log"),
            &[],
        )
    }

    fn wait_until_ready(&self) {
        let began = Instant::now();
        loop {
            let ready = self.kubectl_raw(&["get", "--raw", "/readyz"]);
            if ready.status.success() {
                return;
            }
            assert!(
                began.elapsed() < START_MAX,
                "the API server is not ready: {}\n{}",
                String::from_utf8_lossy(&ready.stderr),
                self.log_tail("apiserver.log")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What a user installs, with the user's own command.
    pub(crate) fn install(&self) {
        self.try_install().unwrap_or_else(|error| panic!("{error}"));
    }

    fn try_install(&self) -> Result<(), String> {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
        self.try_kubectl(&["apply", "-k", &deploy.display().to_string()])?;
        // No pod of it runs here: the webhook of the manifests would only cost its time-out.
        let webhook = ["validatingwebhookconfiguration", "kvtide-control"];
        self.try_kubectl(&["delete", webhook[0], webhook[1], "--ignore-not-found"])?;
        for crd in CRDS {
            self.try_kubectl(&["wait", "--for=condition=Established", "--timeout=60s", crd])?;
        }
        // The API server learns of rights a little later. A controller that is refused stops, and no
        // kubelet starts it again here.
        let watch = ["watch", "stormservices", "--all-namespaces"];
        let lease = ["update", "leases/kvtide-control", "-n", "kvtide-system"];
        for right in [&watch[..], &lease[..]] {
            let asked = [&["auth", "can-i"], right, &["--as", SERVICE_ACCOUNT]].concat();
            until(|| self.try_kubectl(&asked).map(|_| ()))?;
        }
        Ok(())
    }

    /// Installs everything again, and waits until garbage collection knows the new kinds: other tests rely
    /// on it.
    pub(crate) fn install_again(&self) {
        self.put_back().unwrap_or_else(|error| panic!("{error}"));
    }

    /// The same from whatever a test left halfway. Returns what fails: it also runs where a test panicked,
    /// and a second panic would end the process.
    pub(crate) fn put_back(&self) -> Result<(), String> {
        let going = |object: &str| {
            let since = "jsonpath={.metadata.deletionTimestamp}";
            self.try_kubectl(&["get", object, "--ignore-not-found", "-o", since])
                .map(|since| !since.is_empty())
        };
        let gone = |object: &str| {
            self.try_kubectl(&["wait", "--for=delete", object, "--timeout=80s"])
                .map(|_| ())
        };
        for crd in CRDS {
            if going(crd)? {
                self.let_go_of_all(crd)?;
                gone(crd)?;
            }
        }
        // Nothing can be made in a namespace that goes.
        if going(NAMESPACE)? {
            gone(NAMESPACE)?;
        }
        self.try_install()?;
        self.wait_until_garbage_is_collected()
    }

    /// Takes the finalizers off all objects of a CRD that goes: no controller may be left that does.
    fn let_go_of_all(&self, crd: &str) -> Result<(), String> {
        let kind = crd.trim_start_matches("crd/");
        let names =
            "jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name}{\"\\n\"}{end}";
        let all = self.try_kubectl(&["get", kind, "--all-namespaces", "-o", names])?;
        for line in all.lines() {
            let Some((namespace, name)) = line.split_once(' ') else {
                continue;
            };
            let none = r#"{"metadata":{"finalizers":null}}"#;
            let patch = ["patch", kind, name, "--type=merge", "-p", none];
            let outcome = self.try_kubectl(&[&["-n", namespace][..], &patch[..]].concat());
            // It may go by itself meanwhile.
            if let Err(error) = outcome
                && !error.contains("NotFound")
            {
                return Err(error);
            }
        }
        Ok(())
    }

    fn wait_until_garbage_is_collected(&self) -> Result<(), String> {
        let apply = |name: &str, object: &serde_json::Value| {
            let file = self.home.join(format!("{name}.json"));
            fs::write(&file, object.to_string()).map_err(|error| error.to_string())?;
            let file = file.display().to_string();
            self.try_kubectl(&["-n", "default", "apply", "-f", &file])
        };
        let (version, kind) = ("orchestration.aibrix.ai/v1alpha1", "RoleSet");
        let set = json!({"apiVersion": version, "kind": kind,
            "metadata": {"name": "probe"}, "spec": {"roles": []}});
        // A CRD is established a moment before its objects are served.
        until(|| apply("probe-owner", &set).map(|_| ()))?;
        let probe = ["-n", "default", "get", "roleset", "probe"];
        let uid = ["-o", "jsonpath={.metadata.uid}"];
        let uid = self.try_kubectl(&[&probe[..], &uid[..]].concat())?;
        let owner = json!({"apiVersion": version, "kind": kind, "name": "probe", "uid": uid});
        let owned = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "probe", "ownerReferences": [owner]}});
        apply("probe-owned", &owned)?;
        self.try_kubectl(&["-n", "default", "delete", "roleset", "probe"])?;
        until(|| {
            let owned = ["-n", "default", "get", "configmap", "probe"];
            let left = self.try_kubectl(&[&owned[..], &["--ignore-not-found"]].concat())?;
            if left.is_empty() {
                return Ok(());
            }
            Err(format!(
                "garbage collection leaves what a RoleSet owned: {left}"
            ))
        })
    }

    /// Runs our own program with all rights; whether it succeeded, and all that it printed.
    pub(crate) fn kvtide_control(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_kvtide-control"))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.success(), text)
    }

    /// Kills the API server and starts it again on the same port and data.
    pub(crate) fn restart_api_server(&self) {
        let mut running = self.api_server.lock().unwrap();
        running.kill().unwrap();
        running.wait().unwrap();
        let (bin, home) = (self.bin.clone(), self.home.clone());
        let (etcd_url, port) = (self.etcd_url.clone(), self.api_port);
        let (done, started) = mpsc::channel();
        std::thread::spawn(move || {
            done.send(Self::spawn_api_server(&bin, &home, &etcd_url, port))
                .unwrap();
            loop {
                std::thread::park();
            }
        });
        *running = started.recv().unwrap();
        self.wait_until_ready();
    }

    fn kubectl_raw(&self, arguments: &[&str]) -> Output {
        Command::new(self.bin.join("kubectl"))
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .env("HOME", &self.home)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs kubectl, which must succeed.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        let outcome = self.try_kubectl(arguments);
        outcome.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Runs kubectl: its output, or the command with all that it said.
    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.kubectl_raw(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!("kubectl {arguments:?} failed: {text}{errors}"))
    }

    /// Runs kubectl, which must succeed; what it says beside its output.
    pub(crate) fn kubectl_warnings(&self, arguments: &[&str]) -> String {
        let output = self.kubectl_raw(arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "kubectl {arguments:?} failed: {errors}"
        );
        errors
    }

    /// Runs kubectl, which must fail; what it says.
    pub(crate) fn kubectl_fails(&self, arguments: &[&str]) -> String {
        match self.try_kubectl(arguments) {
            Ok(text) => panic!("kubectl {arguments:?} succeeded: {text}"),
            Err(error) => error,
        }
    }

    /// Runs kubectl; what it says if it fails.
    pub(crate) fn kubectl_refused(&self, arguments: &[&str]) -> Option<String> {
        self.try_kubectl(arguments).err()
    }

    /// A client with all rights, for the runtime that calls this.
    pub(crate) async fn client(&self) -> Client {
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options)
            .await
            .unwrap();
        Client::try_from(config).unwrap()
    }

    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    fn log_tail(&self, name: &str) -> String {
        let log = fs::read_to_string(self.home.join(name)).unwrap_or_default();
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }
}

/// Asks again until the answer is no error; the last one where that takes too long.
fn until(ask: impl Fn() -> Result<(), String>) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let answer = ask();
        if answer.is_ok() || began.elapsed() > TAKEN_MAX {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Every request as one line, without bodies: who, what, on which object.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
";

fn kubeconfig(home: &Path, port: u16, user: &str) -> PathBuf {
    let path = home.join(format!("{user}.kubeconfig"));
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": home.join("certs/apiserver.crt"),
        }}],
        "users": [{"name": user, "user": {"token": format!("{user}-token")}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
    });
    fs::write(&path, config.to_string()).unwrap();
    path
}

/// Tests run in one process whose statics are never dropped: a helper that outlives it cleans up.
fn remove_when_process_ends(home: &Path) {
    let parent = std::process::id();
    let script = "while kill -0 $0 2>/dev/null; do sleep 0.5; done; sleep 0.5; rm -rf \"$1\"";
    // In a session of its own: what ends the tests, such as an interrupt, must not end it.
    let helper = Command::new("setsid")
        .args(["sh", "-c", script, &parent.to_string()])
        .arg(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::mem::drop(helper);
}

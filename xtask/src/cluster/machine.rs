//! The cluster's parts, by its scripts, kubectl and Helm.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use spegel_benches::daemon::{output, wait_until};

/// How many nodes it has.
pub(super) const NODES: usize = 3;

/// Where containerd's registry configuration lies on a node, and below which folder.
const CERTS: (&str, &str) = ("/etc/containerd", "certs.d");

/// A Kubernetes cluster on this machine.
#[derive(Debug)]
pub(super) struct Machine {
    folder: PathBuf,
    kubeconfig: OsString,
    path: OsString,
}

// === impl Machine ===

impl Machine {
    /// The cluster whose scripts lie in a folder.
    ///
    /// # Errors
    /// What is missing, and how to have it.
    pub(super) fn find(folder: &Path) -> Result<Self> {
        for script in ["build", "up", "down", "node", "image", "env"] {
            ensure!(
                folder.join(script).is_file(),
                "{} is no test cluster: SPEGEL_TEST_CLUSTER must name a folder with the scripts build, up, down, node, \
                 image and env, which make a Kubernetes with kubelets and containerds on this machine",
                folder.display()
            );
        }
        let folder = folder.canonicalize()?;
        let ask = format!("eval \"$('{}/env')\" && printf '%s\\n%s' \"$KUBECONFIG\" \"$PATH\"", folder.display());
        let said = output(Command::new("bash").args(["-c", &ask]))?;
        let (kubeconfig, path) = said.split_once('\n').context("the script env prints no KUBECONFIG")?;
        let machine = Self { folder, kubeconfig: kubeconfig.into(), path: path.into() };
        ensure!(
            machine.program("kubelet").is_some(),
            "the cluster's binaries are not built: run {} once (some ten minutes)",
            machine.folder.join("build").display()
        );
        Ok(machine)
    }

    fn program(&self, name: &str) -> Option<PathBuf> {
        std::env::split_paths(&self.path).map(|folder| folder.join(name)).find(|file| file.is_file())
    }

    /// The Helm that the cluster brings along.
    ///
    /// # Errors
    /// It has none.
    pub(super) fn helm(&self) -> Result<PathBuf> {
        self.program("helm").context("the cluster has no helm: run its script build")
    }

    /// Starts what of it is not running.
    ///
    /// # Errors
    /// It does not start; the script says why.
    pub(super) fn up(&self) -> Result<()> {
        output(Command::new(self.folder.join("up")).arg(NODES.to_string())).map(drop)
    }

    /// Starts what of it is not running, but ends the upstream registry before anybody can have asked it.
    ///
    /// # Errors
    /// It does not start; the script says why.
    pub(super) fn up_without_registry(&self) -> Result<()> {
        self.up()?;
        self.down(Some("upstream/registry"))
    }

    /// Ends one of its processes or parts, or all of it where `part` is `None`.
    ///
    /// # Errors
    /// It does not end.
    pub(super) fn down(&self, part: Option<&str>) -> Result<()> {
        output(Command::new(self.folder.join("down")).args(part)).map(drop)
    }

    /// A program in the namespaces of a node, counted from 1.
    pub(super) fn node(&self, number: usize, program: &str) -> Command {
        let mut command = Command::new(self.folder.join("node"));
        command.arg(number.to_string()).arg(program);
        command
    }

    /// A program that speaks to the API server.
    pub(super) fn client(&self, program: impl Into<OsString>) -> Command {
        let mut command = Command::new(program.into());
        command.env("KUBECONFIG", &self.kubeconfig).env("PATH", &self.path);
        command
    }

    /// What kubectl prints.
    ///
    /// # Errors
    /// It fails.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        output(self.client("kubectl").args(arguments))
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn get(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&[&["get", "-o", "json"], arguments].concat())?)?)
    }

    /// Runs kubectl with objects as its input and returns what it prints.
    ///
    /// # Errors
    /// The API server refuses one of them; the error says which.
    pub(super) fn feed(&self, arguments: &[&str], objects: &str) -> Result<String> {
        let mut child = self
            .client("kubectl")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no input")?.write_all(objects.as_bytes())?;
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("kubectl {}: {}", arguments.join(" "), String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// Imports an image archive into every node's containerd under a further name too.
    ///
    /// # Errors
    /// containerd refuses it.
    pub(super) fn import(&self, archive: &Path, name: &str, other: &str) -> Result<()> {
        for number in 1..=NODES {
            let ctr = |arguments: &[&str]| {
                let mut command = self.node(number, "ctr");
                command.args(["--namespace", "k8s.io", "images"]).args(arguments);
                command
            };
            // A node has its own /var and /run, but not its own /tmp or folder of builds.
            let archive = archive.to_str().context("a path that is no UTF-8")?;
            output(&mut ctr(&["import", archive]))?;
            output(&mut ctr(&["tag", "--force", name, other]))?;
        }
        Ok(())
    }

    /// Pushes an image to the upstream registry whose only program ends at once: `layers` are its further files.
    ///
    /// # Errors
    /// The registry refuses it.
    pub(super) fn push(&self, image: &str, layers: &[&Path]) -> Result<()> {
        let mut command = Command::new(self.folder.join("image"));
        command.args(["--push", "--entrypoint", "/busybox true", image, "/bin/busybox"]).args(layers);
        output(&mut command).map(drop)
    }

    /// Everything below containerd's registry configuration of every node: kinds, modes, owners, link targets and digests.
    ///
    /// # Errors
    /// A node that is not up.
    pub(super) fn certs(&self) -> Result<String> {
        let mut text = String::new();
        let list = format!(
            "cd {} && find {} -printf '%y %m %U:%G %p -> %l\\n' | sort && find {1} -type f -exec sha256sum {{}} + | sort",
            CERTS.0, CERTS.1
        );
        for number in 1..=NODES {
            writeln!(text, "node{number}")?;
            text.push_str(&output(self.node(number, "sh").args(["-c", &list]))?);
        }
        Ok(text)
    }

    /// A registry's `hosts.toml` on a node; empty if there is none.
    ///
    /// # Errors
    /// A node that is not up.
    pub(super) fn hosts(&self, number: usize, registry: &str) -> Result<String> {
        let file = format!("{}/{}/{registry}/hosts.toml", CERTS.0, CERTS.1);
        output(self.node(number, "sh").args(["-c", &format!("cat {file} 2>/dev/null || true")]))
    }

    /// Writes a file below containerd's registry configuration of a node, as an administrator does.
    ///
    /// # Errors
    /// A node that is not up.
    pub(super) fn write_hosts(&self, number: usize, registry: &str, text: &str) -> Result<()> {
        let folder = format!("{}/{}/{registry}", CERTS.0, CERTS.1);
        let script = format!("mkdir -p {folder} && printf '%s' '{text}' > {folder}/hosts.toml");
        output(self.node(number, "sh").args(["-c", &script])).map(drop)
    }

    /// Removes a registry's folder again.
    ///
    /// # Errors
    /// A node that is not up.
    pub(super) fn remove_hosts(&self, number: usize, registry: &str) -> Result<()> {
        let folder = format!("{}/{}/{registry}", CERTS.0, CERTS.1);
        output(self.node(number, "rm").args(["-r", &folder])).map(drop)
    }

    /// What the mirror left in its own directories of the nodes.
    ///
    /// # Errors
    /// A node that is not up.
    pub(super) fn left_on_nodes(&self) -> Result<String> {
        let mut text = String::new();
        for number in 1..=NODES {
            let list = "find /var/lib/spegel -mindepth 1 2>/dev/null || true";
            text.push_str(&output(self.node(number, "sh").args(["-c", list]))?);
        }
        Ok(text)
    }

    /// Waits until every node is ready, as it is not for a while after its kubelet was gone.
    ///
    /// # Errors
    /// One is not within two minutes.
    pub(super) fn wait_ready(&self) -> Result<()> {
        self.kubectl(&["wait", "--for=condition=Ready", "--timeout=120s", "nodes", "--all"]).map(drop)
    }

    /// Waits until the namespace has nothing but what every namespace has.
    ///
    /// # Errors
    /// What is left after a minute.
    pub(super) fn wait_empty(&self, namespace: &str) -> Result<()> {
        let kinds = "daemonsets,jobs,pods,services,endpointslices,serviceaccounts,roles,rolebindings,networkpolicies,\
                     configmaps,secrets,controllerrevisions";
        let left = || -> Result<Vec<String>> {
            let names = self.kubectl(&["get", kinds, "--namespace", namespace, "--output", "name"])?;
            let usual = ["serviceaccount/default", "configmap/kube-root-ca.crt"];
            Ok(names.lines().filter(|name| !usual.contains(name)).map(str::to_owned).collect())
        };
        let emptied = wait_until(Duration::from_secs(60), "the namespace", || left().is_ok_and(|left| left.is_empty()));
        let left = left()?;
        ensure!(emptied.is_ok() && left.is_empty(), "left in the cluster: {}", left.join(" "));
        Ok(())
    }
}

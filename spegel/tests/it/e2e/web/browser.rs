//! A real Chromium on a node, driven through WebDriver.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use fantoccini::wd::WebDriverCompatibleCommand;
use fantoccini::{Client, ClientBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use spegel_benches::daemon::{Daemon, find_program};
use spegel_benches::netns::Node;
use tokio::runtime::Runtime;
use url::{ParseError, Url};

/// Where the driver listens on its node.
const PORT: u16 = 9515;
/// How soon what is waited for is on a page; far above what it takes.
const SOON: Duration = Duration::from_secs(20);

/// One window. What is declared first ends first.
pub(super) struct Browser {
    client: Option<Client>,
    runtime: Runtime,
    _driver: Daemon,
    screenshots: PathBuf,
}

/// A command of Chromium's own, which WebDriver does not have.
#[derive(Debug)]
struct Own(&'static str, Value);

impl WebDriverCompatibleCommand for Own {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.0))
    }

    fn method_and_body(&self, _: &Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.1.to_string()))
    }
}

impl Browser {
    /// Whether this machine has one; else what is missing, to print beside a skipped test.
    pub(super) fn available() -> Result<(), String> {
        for (program, package) in [("chromium", "chromium"), ("chromedriver", "chromium-driver")] {
            if find_program(program).is_none() {
                return Err(format!("{program} is not installed (Debian package {package})"));
            }
        }
        Ok(())
    }

    /// Starts one on a node, whose own pages it may see.
    pub(super) fn start(node: &Node, folder: &Path) -> Self {
        let port = format!("--port={PORT}");
        // The browsers that it starts are not ours to end: they end with the first process of their namespace.
        let alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
        let home = format!("HOME={}", folder.display());
        let own = ["env", &home, "chromedriver", &port, "--allowed-ips=", "--allowed-origins=*"];
        let command = [&alone[..], &own].concat();
        let mut driver = Daemon::start("chromedriver", Some(node), &command, &folder.join("chromedriver.log")).unwrap();
        let at = std::net::SocketAddr::from((node.address(), PORT));
        driver.wait_until(SOON, "its port", || std::net::TcpStream::connect(at).is_ok()).unwrap();
        let profile = folder.join("profile").display().to_string();
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            &format!("--user-data-dir={profile}"),
        ];
        let wishes = json!({
            "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let Value::Object(wishes) = wishes else { unreachable!("it is one") };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(wishes);
        let client = runtime.block_on(builder.connect(&format!("http://{at}"))).unwrap();
        let screenshots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("web");
        fs::create_dir_all(&screenshots).unwrap();
        Self { client: Some(client), runtime, _driver: driver, screenshots }
    }

    fn client(&self) -> &Client {
        self.client.as_ref().unwrap()
    }

    fn own(&self, endpoint: &'static str, body: Value) -> Value {
        self.runtime.block_on(self.client().issue_cmd(Own(endpoint, body))).unwrap()
    }

    /// A command of the developer tools' protocol.
    fn tool(&self, command: &str, parameters: Value) -> Value {
        self.own("goog/cdp/execute", json!({ "cmd": command, "params": parameters }))
    }

    pub(super) fn go(&self, url: &str) {
        self.runtime.block_on(self.client().goto(url)).unwrap();
    }

    /// The value of an expression on the page.
    pub(super) fn ask(&self, expression: &str) -> Value {
        let script = format!("return ({expression});");
        self.runtime.block_on(self.client().execute(&script, vec![])).unwrap()
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub(super) fn wait(&self, what: &str, expression: &str) {
        let end = Instant::now() + SOON;
        while self.ask(expression) != true {
            assert!(Instant::now() < end, "{what} is not on the page: {}", self.text());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What a person reads on the page.
    pub(super) fn text(&self) -> String {
        self.ask("document.querySelector('main').innerText").as_str().unwrap_or_default().to_owned()
    }

    /// A window of this size, and which colours its user prefers.
    pub(super) fn emulate(&self, width: u32, height: u32, colours: &str) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.tool("Emulation.setDeviceMetricsOverride", size);
        let feature = json!({ "features": [{ "name": "prefers-color-scheme", "value": colours }] });
        self.tool("Emulation.setEmulatedMedia", feature);
    }

    pub(super) fn set_scripts(&self, on: bool) {
        self.tool("Emulation.setScriptExecutionDisabled", json!({ "value": !on }));
    }

    /// The page as it was sent, which needs no script on it to be asked for.
    pub(super) fn source(&self) -> String {
        self.runtime.block_on(self.client().source()).unwrap()
    }

    /// Presses what the selector finds.
    pub(super) fn press(&self, selector: &str) {
        self.runtime.block_on(async {
            let element = self.client().find(fantoccini::Locator::Css(selector)).await.unwrap();
            element.click().await.unwrap();
        });
    }

    pub(super) fn write(&self, selector: &str, text: &str) {
        self.runtime.block_on(async {
            let element = self.client().find(fantoccini::Locator::Css(selector)).await.unwrap();
            element.clear().await.unwrap();
            element.send_keys(text).await.unwrap();
        });
    }

    /// The whole page as a picture.
    pub(super) fn keep(&self, name: &str) {
        let picture = self.tool("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": true }));
        let bytes = base64::engine::general_purpose::STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        fs::write(self.screenshots.join(format!("{name}.png")), bytes).unwrap();
    }

    /// What the console says since it was last asked: errors and warnings, those of the security policy among them.
    pub(super) fn complaints(&self) -> Vec<String> {
        let said = self.own("se/log", json!({ "type": "browser" }));
        let told =
            said.as_array().into_iter().flatten().filter(|line| line["level"] != "INFO" && line["level"] != "DEBUG");
        told.map(ToString::to_string).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A test that failed may have left it in any state.
        if let Some(client) = self.client.take() {
            let _ = self.runtime.block_on(client.close());
        }
    }
}

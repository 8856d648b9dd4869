//! The pages for people, in a real browser on a node, while its containerd really pulls.

mod browser;

use std::thread;
use std::time::Duration;

use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::Compression;

use super::cluster::Cluster;
use super::cri;
use browser::Browser;

const NODES: usize = 4;
/// What the upstream's and a node's link carry, in Mbit/s: slow enough that a pull can be watched.
const UPSTREAM: u32 = 40;
const PAGES: [(&str, &str); 5] = [
    ("", "Is it working?"),
    ("content", "What is here?"),
    ("peers", "Who is out there?"),
    ("try", "Try it"),
    ("storm", "Storm"),
];

/// A node that has pulled, one that knows its peers, and a browser on it.
struct Stage {
    browser: Browser,
    cluster: Cluster,
}

impl Stage {
    fn new() -> Option<Self> {
        if let Err(reason) = Browser::available() {
            println!("skipped: {reason}");
            return None;
        }
        let cluster =
            Cluster::start_with(Version::V1_6, NODES, &Options::default(), &["--storm", "on", "--zone", "zone-a"])?;
        for node in &cluster.nodes {
            let members = || node.spegel().metric("spegel_router_members", &[]).unwrap_or(0.0);
            wait_until(Duration::from_secs(60), "all to know each other", || members() >= (NODES - 1) as f64).unwrap();
        }
        let browser = Browser::start(cluster.nodes[1].containerd.node(), cluster.folder.path());
        Some(Self { browser, cluster })
    }

    fn url(&self, page: &str) -> String {
        format!("{}/debug/web/{page}", self.cluster.nodes[1].spegel().metrics_url())
    }

    /// The form on its page, sent by one of its buttons.
    fn try_it(&self, button: &str, image: &str) {
        self.browser.go(&self.url("try"));
        self.browser.write("#image", image);
        self.browser.press(&format!("button[value={button}]"));
        self.browser.wait("an answer", "!!document.querySelector('#result .verdict')");
    }

    /// What must be so on every page, in every window.
    #[track_caller]
    fn check_page(&self, page: &str, title: &str, width: u32) {
        let browser = &self.browser;
        assert_eq!(browser.ask("document.querySelector('h1').textContent"), title);
        let overhang = browser.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(overhang, 0, "{page} is wider than {width} px");
        for (what, expression) in [
            ("one main landmark", "document.querySelectorAll('main').length === 1"),
            ("a name of the navigation", "!!document.querySelector('nav[aria-label]')"),
            ("where one is", "document.querySelectorAll('nav [aria-current=page]').length === 1"),
            (
                "a caption of each table",
                "[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent)",
            ),
            (
                "words for each picture",
                "[...document.querySelectorAll('svg')].every(s => s.ariaHidden === 'true' || s.ariaLabel)",
            ),
            ("a label of each field", "[...document.querySelectorAll('input')].every(i => i.labels.length)"),
            (
                "ids that are one's own",
                "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length",
            ),
            (
                "room for each table to scroll in, by the keyboard too",
                "[...document.querySelectorAll('table')].every(t => t.closest('.scroll[tabindex]'))",
            ),
            ("links that can be pressed", PRESSABLE),
            ("its style", "getComputedStyle(document.querySelector('nav ul')).listStyleType === 'none'"),
            (
                "nothing from elsewhere",
                "performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))",
            ),
            ("text that can be read", CONTRAST),
        ] {
            assert_eq!(browser.ask(expression), true, "{page} at {width} px lacks {what}");
        }
        let complaints = browser.complaints();
        assert!(complaints.is_empty(), "{page}: {complaints:?}");
    }
}

/// Whether each link is where it can be seen, once it was scrolled to, and large enough to be met (WCAG 2.2, 2.5.8), but for the one that shows itself to
/// the keyboard only.
const PRESSABLE: &str = r#"(() => {
  const bad = [...document.querySelectorAll('a:not(.skip)')].find(link => {
    link.scrollIntoView({ block: 'center', inline: 'center', behavior: 'instant' });
    // One that goes over two lines is met on the first.
    const { x, y, width, height } = link.getClientRects()[0] || new DOMRect();
    const met = document.elementFromPoint(x + width / 2, y + height / 2);
    return !link.contains(met) || (height < 24 && link.closest('th'));
  });
  scrollTo(0, 0);
  return bad ? bad.outerHTML : true;
})()"#;

/// Whether all text stands out from what is behind it by 4.5 to 1 (WCAG 2.2, 1.4.3).
const CONTRAST: &str = r#"(() => {
  const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const of = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * of(r) + 0.7152 * of(g) + 0.0722 * of(b);
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return texts.filter(e => e.tagName !== 'TITLE').every(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) >= 4.5;
  });
})()"#;

#[test]
fn people_see_what_the_mirror_does() {
    let Some(stage) = Stage::new() else { return };
    let cluster = &stage.cluster;
    let shop = cluster.push("shop/checkout:2.4.1", |image| image.layers(3, 6 << 20, Compression::Gzip, 60));
    let base = cluster.push("base/python:3.12-slim", |image| image.layers(2, 4 << 20, Compression::None, 61));
    for image in [&shop, &base] {
        cluster.nodes[0].pull_by_cri(image, image.reference());
        cluster.wait_resolved(1, image);
        cluster.nodes[1].pull_by_cri(image, image.reference());
    }
    cluster.nodes[2].pull_by_cri(&shop, shop.reference());
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();

    a_pull_is_watched(&stage);
    every_page_fits_every_window(&stage, shop.reference());
    without_scripts_all_is_there(&stage, shop.reference());
    other_sites_start_nothing(&stage, shop.reference());
    only_this_node_is_told(&stage);
}

/// What arrives is shown while it does, without loading the page again, and the storm's tree with it.
fn a_pull_is_watched(stage: &Stage) {
    let (browser, cluster) = (&stage.browser, &stage.cluster);
    let report = cluster.push("shop/report:7", |image| image.layers(2, 12 << 20, Compression::None, 62));
    browser.emulate(1280, 900, "light");
    browser.go(&stage.url("content"));
    browser.wait("the word that it is live", "document.getElementById('live').textContent === 'Live.'");
    browser.ask("(window.loaded = 1)");
    assert_eq!(browser.ask("document.querySelectorAll('#arriving tbody tr').length"), 0);
    thread::scope(|scope| {
        let pulls: Vec<_> = cluster.nodes[..3]
            .iter()
            .map(|node| {
                let (socket, reference) = (node.containerd.socket(), report.reference().to_owned());
                scope.spawn(move || cri::pull(&socket, &reference))
            })
            .collect();
        browser.wait("what arrives", "document.querySelectorAll('#arriving tbody tr').length > 0");
        let first = browser.ask("document.querySelector('#arriving').innerText");
        browser.wait("its growth", &format!("document.querySelector('#arriving').innerText !== {first}"));
        browser.keep("content-live");
        browser.ask("(document.querySelector('#pause').click(), 1)");
        browser.wait("the pause", "document.getElementById('live').textContent === 'Paused.'");
        browser.go(&stage.url("storm"));
        browser.wait("a blob that is coordinated", "document.querySelectorAll('#pulls tbody tr').length > 0");
        browser.keep("storm-live");
        browser.go(&stage.url("content"));
        browser.ask("(window.loaded = 1)");
        pulls.into_iter().for_each(|pull| pull.join().unwrap().unwrap());
        browser.wait("the image", "document.querySelector('#images').innerText.includes('shop/report:7')");
        browser.wait("the end of what arrived", "document.querySelectorAll('#arriving tbody tr').length === 0");
        assert_eq!(browser.ask("window.loaded"), 1, "the page was loaded anew");
    });
    browser.go(&stage.url(""));
    browser.wait("where bytes came from", "document.querySelector('#sources').innerText.includes('from peers')");
    assert!(
        browser.ask("document.querySelector('#verdict').innerText").as_str().unwrap().contains("Yes"),
        "{}",
        browser.text()
    );
    let complaints = browser.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
}

fn every_page_fits_every_window(stage: &Stage, image: &str) {
    let browser = &stage.browser;
    for (page, title) in PAGES.into_iter().chain([("measured", "Try it")]) {
        let name = if page.is_empty() { "working" } else { page };
        match page {
            "measured" => stage.try_it("measure", image),
            page => browser.go(&stage.url(page)),
        }
        for (width, height, colours) in [
            (1280, 900, "light"),
            (1280, 900, "dark"),
            (768, 900, "light"),
            (320, 700, "light"),
            (320, 700, "dark"),
            (1920, 1080, "dark"),
        ] {
            browser.emulate(width, height, colours);
            stage.check_page(page, title, width);
            browser.keep(&format!("{name}-{width}-{colours}"));
        }
    }
    // The keyboard's first stop leads to the content.
    browser.go(&stage.url(""));
    assert_eq!(browser.ask("document.querySelector('a').getAttribute('href')"), "#main");
    // Peers in the order that somebody asks for.
    browser.go(&stage.url("peers?sort=address"));
    let addresses = browser.ask("[...document.querySelectorAll('#peers tbody .address')].map(e => e.textContent)");
    let mut sorted: Vec<_> = addresses.as_array().unwrap().clone();
    sorted.sort_by_key(|address| address.as_str().unwrap().parse::<std::net::IpAddr>().unwrap());
    assert!(addresses.as_array() == Some(&sorted) && sorted.len() >= NODES - 1, "{addresses}");
}

fn without_scripts_all_is_there(stage: &Stage, image: &str) {
    let browser = &stage.browser;
    browser.emulate(1280, 900, "light");
    browser.set_scripts(false);
    for (page, title) in PAGES {
        browser.go(&stage.url(page));
        assert!(browser.source().contains(&format!("<h1>{title}</h1>")), "{page}");
    }
    browser.go(&stage.url("try"));
    browser.write("#image", image);
    browser.press("button[value=measure]");
    browser.set_scripts(true);
    browser.wait("what came", "!!document.querySelector('#result .verdict.good')");
    assert!(browser.text().contains("local"), "this node has it: {}", browser.text());
    // What only peers have comes from them.
    let absent = stage.cluster.push("shop/only-there:1", |builder| builder.layers(1, 3 << 20, Compression::None, 63));
    stage.cluster.nodes[0].pull_by_cri(&absent, absent.reference());
    stage.cluster.wait_resolved(1, &absent);
    stage.try_it("measure", absent.reference());
    let peer = stage.cluster.nodes[0].spegel().url().replace("http://", "");
    assert!(browser.text().contains(&peer), "{}", browser.text());
    browser.keep("measured-from-a-peer");
    a_peers_rate_is_drawn(stage, absent.reference());
    stage.try_it("lookup", "registry.test/nobody:1");
    assert!(browser.text().contains("No node has it."), "{}", browser.text());
}

/// What a peer gives meanwhile is drawn on the page that is open.
fn a_peers_rate_is_drawn(stage: &Stage, image: &str) {
    let browser = &stage.browser;
    browser.go(&stage.url("peers"));
    browser.wait("the word that it is live", "document.getElementById('live').textContent === 'Live.'");
    let measure = format!("fetch('/debug/web/measure?image={image}', {{ method: 'POST' }})");
    browser.ask(&format!("({measure}.then(a => a.json()).then(told => {{ window.told = told; }}), 1)"));
    browser.wait("the measurement", "!!window.told && window.told.pull.bytes > 3000000 && !window.told.pull.ended");
    browser.wait("its rate", "!!document.querySelector('#peers .spark polyline')");
    browser.keep("peers-live");
}

/// A page of another origin, here the registry's port, sends the browser to what the node would do. It is reached by plain http at an address
/// that is not loopback, where the browser does not say where a request is from.
fn other_sites_start_nothing(stage: &Stage, image: &str) {
    let browser = &stage.browser;
    let elsewhere = format!("{}/v2/", stage.cluster.nodes[1].spegel().url());
    let form = format!(
        "(() => {{ const form = document.createElement('form'); form.method = 'post'; form.action = '{}?image={image}'; \
         document.body.append(form); form.submit(); return 1; }})()",
        stage.url("measure")
    );
    let profile = stage.url("").replace("/debug/web/", "/debug/pprof/profile?seconds=1");
    let link = format!(
        "(() => {{ const link = document.createElement('a'); link.rel = 'noreferrer'; link.href = '{profile}'; \
         document.body.append(link); link.click(); return 1; }})()"
    );
    for (sent, refusal) in [(form, "a page of another site"), (link, "does not say which page")] {
        browser.go(&elsewhere);
        browser.ask(&sent);
        browser.wait("the refusal", &format!("document.body.innerText.includes('{refusal}')"));
    }
    // Its own page may.
    stage.try_it("measure", image);
}

fn only_this_node_is_told(stage: &Stage) {
    let client = Client::new(Duration::from_secs(10));
    for page in ["", "content", "events?page=working", "stats", "try?image=registry.test/app:1"] {
        let answer = client.get(&stage.url(page), &[]).unwrap();
        assert_eq!(answer.head.status, 403, "{page} from another address: {}", answer.text());
    }
    let metrics = format!("{}/metrics", stage.cluster.nodes[1].spegel().metrics_url());
    assert_eq!(client.get(&metrics, &[]).unwrap().head.status, 200);
}

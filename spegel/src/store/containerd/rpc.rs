//! What is asked of containerd's API, each call in our namespace and within a bounded time.

use std::collections::HashSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::events::{ContentCreate, ContentDelete};
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    GetImageRequest, ImageDelete, InfoRequest, ListContentRequest, ListImagesRequest, ListNamespacesRequest,
    PluginsRequest, SubscribeRequest,
};
use containerd_client::types::{Descriptor, Envelope};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::super::StoreError;
use super::inspect::Cri;
use crate::oci::Digest;

/// How long one call may take. containerd answers within milliseconds; a disk that is overloaded by pulls makes it seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the list of all content may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);

/// The largest answer that is read, in bytes: an image's record with its labels takes about 1 KiB.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// How many events wait here; past them they wait in containerd.
const EVENT_QUEUE: usize = 1024;

/// The topics that are followed. `/content/create` exists since containerd 2.1.
const TOPICS: [&str; 5] = ["/images/create", "/images/update", "/images/delete", "/content/create", "/content/delete"];

/// The name of the plugin whose directory the content is in.
const CONTENT_PLUGIN: &str = "io.containerd.content.v1";

/// A connection to containerd, for one namespace.
#[derive(Clone, Debug)]
pub(super) struct Rpc {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
}

/// An image as containerd records it.
#[derive(Clone, Debug)]
pub(super) struct ImageRecord {
    pub(super) name: String,
    pub(super) top: Digest,
    /// In bytes, where the record has it.
    pub(super) size: Option<u64>,
}

/// What containerd tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Something happened to the image of this name.
    Image(String),
    /// This content is complete.
    ContentCreated(Digest),
    /// This content is gone.
    ContentDeleted(Digest),
}

/// The events of our namespace, as they come. Ends with an error, never quietly.
#[derive(Debug)]
pub(super) struct Events {
    receiver: mpsc::Receiver<Result<Event, StoreError>>,
    _reader: AbortOnDropHandle<()>,
}

fn failed(what: &str, reason: impl std::fmt::Display) -> StoreError {
    StoreError::Containerd(format!("{what}: {reason}"))
}

fn refused(what: &str, status: &Status) -> StoreError {
    failed(what, format_args!("{:?}: {}", status.code(), status.message()))
}

async fn within<T>(limit: Duration, what: &str, call: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(limit, call).await.map_err(|_| failed(what, format_args!("no answer within {limit:?}")))
}

async fn call<T>(what: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, StoreError> {
    let answer = within(CALL_TIMEOUT, what, call).await?;
    answer.map(Response::into_inner).map_err(|status| refused(what, &status))
}

// === impl Rpc ===

impl Rpc {
    /// Connects to containerd's socket.
    pub(super) async fn connect(socket: &Path, namespace: &str) -> Result<Self, StoreError> {
        let namespace = namespace.parse().map_err(|_| {
            StoreError::Mismatch(format!(
                "{namespace:?} cannot be a containerd namespace: use letters, digits, - and ."
            ))
        })?;
        let what = format!("connect to {}", socket.display());
        let channel = within(CALL_TIMEOUT, &what, containerd_client::connect(socket)).await?;
        let channel = channel.map_err(|error| failed(&what, root_cause(&error)))?;
        Ok(Self { channel, namespace })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request
    }

    fn images_client(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// All images. Those whose digest we cannot read are left out.
    pub(super) async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let mut client = self.images_client();
        let request = self.request(ListImagesRequest { filters: Vec::new() });
        let answer = call("list images", client.list(request)).await?;
        Ok(answer.images.into_iter().filter_map(|image| ImageRecord::new(image.name, image.target)).collect())
    }

    /// One image, if there is one of this name.
    pub(super) async fn image(&self, name: &str) -> Result<Option<ImageRecord>, StoreError> {
        let what = "get image";
        let mut client = self.images_client();
        let request = self.request(GetImageRequest { name: name.to_owned() });
        match within(CALL_TIMEOUT, what, client.get(request)).await? {
            Ok(answer) => {
                let image = answer.into_inner().image;
                Ok(image.and_then(|image| ImageRecord::new(image.name, image.target)))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused(what, &status)),
        }
    }

    /// The digests of all content in our namespace.
    pub(super) async fn contents(&self) -> Result<HashSet<Digest>, StoreError> {
        let what = "list content";
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let request = self.request(ListContentRequest { filters: Vec::new() });
        let listing = async {
            let mut digests = HashSet::new();
            let mut answers = client.list(request).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                digests.extend(answer.info.iter().filter_map(|info| info.digest.parse::<Digest>().ok()));
            }
            Ok::<_, Status>(digests)
        };
        within(LIST_TIMEOUT, what, listing).await?.map_err(|status| refused(what, &status))
    }

    /// The digests of all content in our namespace, with their sizes in bytes.
    pub(super) async fn sizes(&self) -> Result<Vec<(Digest, u64)>, StoreError> {
        let what = "list content";
        let mut client = ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let request = self.request(ListContentRequest { filters: Vec::new() });
        let listing = async {
            let mut found = Vec::new();
            let mut answers = client.list(request).await?.into_inner();
            while let Some(answer) = answers.message().await? {
                let known = answer
                    .info
                    .iter()
                    .filter_map(|info| Some((info.digest.parse().ok()?, u64::try_from(info.size).ok()?)));
                found.extend(known);
            }
            Ok::<_, Status>(found)
        };
        within(LIST_TIMEOUT, what, listing).await?.map_err(|status| refused(what, &status))
    }

    /// containerd's own version.
    pub(super) async fn version(&self) -> Result<String, StoreError> {
        let mut client = VersionClient::new(self.channel.clone());
        Ok(call("ask for the version", client.version(self.request(()))).await?.version)
    }

    /// The names of all namespaces.
    pub(super) async fn namespaces(&self) -> Result<Vec<String>, StoreError> {
        let mut client = NamespacesClient::new(self.channel.clone());
        let request = self.request(ListNamespacesRequest::default());
        let answer = call("list namespaces", client.list(request)).await?;
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// Whether our namespace has this content.
    pub(super) async fn has(&self, digest: &Digest) -> Result<bool, StoreError> {
        let what = "ask for content";
        let mut client = ContentClient::new(self.channel.clone());
        let request = self.request(InfoRequest { digest: digest.to_string() });
        match within(CALL_TIMEOUT, what, client.info(request)).await? {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused(what, &status)),
        }
    }

    /// Where containerd says that its content is.
    pub(super) async fn content_path(&self) -> Result<PathBuf, StoreError> {
        let mut client = IntrospectionClient::new(self.channel.clone());
        let filters = vec![format!("type=={CONTENT_PLUGIN},id==content")];
        let answer = call("ask for plugins", client.plugins(self.request(PluginsRequest { filters }))).await?;
        let mut plugins = answer.plugins.into_iter().filter(|plugin| plugin.r#type == CONTENT_PLUGIN);
        plugins.find_map(|mut plugin| plugin.exports.remove("root")).map(PathBuf::from).ok_or_else(|| {
            StoreError::Mismatch(
                "containerd does not say where its content is: name its content directory with --containerd-content-path".to_owned(),
            )
        })
    }

    /// Whether it serves the CRI.
    pub(super) async fn cri(&self) -> Result<Cri, StoreError> {
        let mut client = IntrospectionClient::new(self.channel.clone());
        // Since 2.0 images are a plugin of their own, without which the other one is not loaded.
        let names = [("io.containerd.cri.v1", "images"), ("io.containerd.grpc.v1", "cri")];
        let filters = names.map(|(kind, id)| format!("type=={kind},id=={id}")).to_vec();
        let answer = call("ask for plugins", client.plugins(self.request(PluginsRequest { filters }))).await?;
        let found = names.map(|(kind, id)| answer.plugins.iter().find(|found| found.r#type == kind && found.id == id));
        let failed = found.iter().flatten().find_map(|plugin| plugin.init_err.as_ref());
        Ok(match (failed, found) {
            (Some(error), _) => Cri::Failed(error.message.clone()),
            (None, [_, Some(_)]) => Cri::Loaded,
            (None, [_, None]) => Cri::Absent,
        })
    }

    /// Follows what happens in our namespace from about now on: containerd does not say when it begins, so what is listed
    /// right after has to be listed once more a moment later.
    pub(super) fn events(&self) -> Events {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let rpc = self.clone();
        let reader = tokio::spawn(async move {
            let ended = rpc.forward_events(&sender).await;
            let _ = sender.send(Err(ended)).await;
        });
        Events { receiver, _reader: AbortOnDropHandle::new(reader) }
    }

    async fn forward_events(&self, sender: &mpsc::Sender<Result<Event, StoreError>>) -> StoreError {
        let what = "follow events";
        let namespace = self.namespace.to_str().unwrap_or_default();
        let filters = TOPICS.iter().map(|topic| format!("topic==\"{topic}\",namespace==\"{namespace}\"")).collect();
        let mut client = EventsClient::new(self.channel.clone());
        // Answered with the first event, so this wait has no bound of its own; the lists find a containerd that hangs.
        let mut events = match client.subscribe(self.request(SubscribeRequest { filters })).await {
            Ok(events) => events.into_inner(),
            Err(status) => return refused(what, &status),
        };
        loop {
            match events.message().await {
                Ok(Some(envelope)) => {
                    let Some(event) = Event::decode(envelope) else { continue };
                    if sender.send(Ok(event)).await.is_err() {
                        return failed(what, "nobody listens");
                    }
                }
                Ok(None) => return failed(what, "containerd ended the stream"),
                Err(status) => return refused(what, &status),
            }
        }
    }
}

/// What lies beneath an error of the transport, which by itself says no more than that there was one.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

// === impl ImageRecord ===

impl ImageRecord {
    fn new(name: String, target: Option<Descriptor>) -> Option<Self> {
        let target = target?;
        match target.digest.parse() {
            Ok(top) => Some(Self { name, top, size: u64::try_from(target.size).ok().filter(|&size| size > 0) }),
            Err(error) => {
                tracing::debug!(image = name, digest = target.digest, %error, "left out");
                None
            }
        }
    }
}

// === impl Event ===

impl Event {
    fn decode(envelope: Envelope) -> Option<Self> {
        let bytes = &*envelope.event?.value;
        match envelope.topic.as_str() {
            "/content/create" => Some(Self::ContentCreated(ContentCreate::decode(bytes).ok()?.digest.parse().ok()?)),
            "/content/delete" => Some(Self::ContentDeleted(ContentDelete::decode(bytes).ok()?.digest.parse().ok()?)),
            // The name is the first field of all three messages, and the only one that counts here.
            topic if topic.starts_with("/images/") => Some(Self::Image(ImageDelete::decode(bytes).ok()?.name)),
            _ => None,
        }
    }
}

// === impl Events ===

impl Events {
    /// The next event. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Event, StoreError> {
        self.receiver.recv().await.unwrap_or_else(|| Err(failed("follow events", "the reader ended")))
    }
}

"""What the API servers of JobSet, Job and Pod take: for the test of launch/gke_jobset.yaml."""

import re

# What the published APIs of JobSet v1alpha2, Job and Pod take, of the fields that a launcher could
# use, with the checks of their servers; anything else is refused. A shape is a type, a set of
# constants, a range, a pattern, alternatives in a tuple, [the shape of all items], {str: the shape
# of all values} or {field: shape}, with "!" after a field that must be there.
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
COUNT = range(2**31)
TEXTS = {str: str}
QUANTITY = (COUNT, re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?"))
META = {"name": LABEL, "namespace": LABEL, "labels": TEXTS, "annotations": TEXTS}
ENV = {
  "name!": re.compile(r"[A-Za-z_]\w*"),
  "value": str,
  "valueFrom": {
    "fieldRef": {"fieldPath!": str, "apiVersion": str},
    "secretKeyRef": {"name!": str, "key!": str, "optional": bool},
    "configMapKeyRef": {"name!": str, "key!": str, "optional": bool},
  },
}
MOUNT = {"name!": LABEL, "mountPath!": str, "subPath": str, "readOnly": bool}
CONTAINER = {
  "name!": LABEL, "image": str, "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
  "command": [str], "args": [str], "workingDir": str, "env": [ENV], "volumeMounts": [MOUNT],
  "resources": {"limits": {str: QUANTITY}, "requests": {str: QUANTITY}},
  "ports": [{"containerPort!": range(1, 65536), "name": LABEL, "protocol": {"TCP", "UDP", "SCTP"}}],
  "securityContext": {"privileged": bool, "runAsUser": COUNT, "runAsGroup": COUNT},
}  # fmt: skip
VOLUME = {
  "name!": LABEL,
  "persistentVolumeClaim": {"claimName!": LABEL, "readOnly": bool},
  "emptyDir": {"medium": {"", "Memory", "HugePages"}, "sizeLimit": QUANTITY},
  "nfs": {"server!": str, "path!": str, "readOnly": bool},
  "hostPath": {"path!": str, "type": {"", "Directory", "DirectoryOrCreate", "File", "Socket"}},
  "secret": {"secretName": str, "optional": bool},
  "configMap": {"name": str, "optional": bool},
}
TOLERATION = {
  "key": str, "operator": {"Exists", "Equal"}, "value": str, "tolerationSeconds": int,
  "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
}  # fmt: skip
POD = {
  "restartPolicy": {"Never", "OnFailure"},  # of a Job's pods
  "terminationGracePeriodSeconds": COUNT, "activeDeadlineSeconds": range(1, 2**31),
  "nodeSelector": TEXTS, "tolerations": [TOLERATION], "containers!": [CONTAINER],
  "initContainers": [CONTAINER], "volumes": [VOLUME], "serviceAccountName": str,
  "priorityClassName": str, "hostNetwork": bool, "subdomain": LABEL,
  "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
}  # fmt: skip
POD_RULE = {
  "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
  "onExitCodes": {"containerName": LABEL, "operator!": {"In", "NotIn"}, "values!": [COUNT]},
  "onPodConditions": [
    {
      "type!": {
        "PodScheduled", "PodReadyToStartContainers", "ContainersReady", "Initialized", "Ready",
        "DisruptionTarget",
      },
      "status": {"True", "False", "Unknown"},
    }
  ],
}  # fmt: skip
JOB = {
  "parallelism": COUNT, "completions": COUNT, "completionMode": {"NonIndexed", "Indexed"},
  "backoffLimit": COUNT, "backoffLimitPerIndex": COUNT, "maxFailedIndexes": COUNT,
  "activeDeadlineSeconds": range(1, 2**31), "ttlSecondsAfterFinished": COUNT, "suspend": bool,
  "podReplacementPolicy": {"TerminatingOrFailed", "Failed"},
  "podFailurePolicy": {"rules!": [POD_RULE]}, "template!": {"metadata": META, "spec!": POD},
}  # fmt: skip
JOBSET_RULE = {
  "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
  "action!": {
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
  },
  "onJobFailureReasons": [
    {
      "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
      "PodFailurePolicy",
    }
  ],
  "onJobFailureMessagePatterns": [str],
  "targetReplicatedJobs": [LABEL],
}  # fmt: skip
REPLICATED_JOB = {
  "name!": LABEL, "groupName": LABEL, "replicas": COUNT,
  "dependsOn": [{"name!": LABEL, "status!": {"Ready", "Complete"}}],
  "template!": {"metadata": META, "spec!": JOB},
}  # fmt: skip
JOBSET = {
  "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
  "kind!": {"JobSet"},
  "metadata!": {**META, "name!": LABEL},
  "spec!": {
    "replicatedJobs!": [REPLICATED_JOB],
    "failurePolicy": {
      "maxRestarts": COUNT,
      "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
      "rules": [JOBSET_RULE],
    },
    "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [LABEL]},
    "startupPolicy": {"startupPolicyOrder!": {"AnyOrder", "InOrder"}},
    "network": {"enableDNSHostnames": bool, "subdomain": LABEL, "publishNotReadyAddresses": bool},
    "coordinator": {"replicatedJob!": LABEL, "jobIndex": COUNT, "podIndex": COUNT},
    "suspend": bool,
    "managedBy": str,
    "ttlSecondsAfterFinished": COUNT,
  },
}


def misfits(value, shape, where):
  """What in nested values does not fit the shape, each with its place."""
  if isinstance(shape, tuple):
    found = [misfits(value, one, where) for one in shape]
    return [] if [] in found else found[0]
  if isinstance(shape, list):
    if not isinstance(value, list):
      return [f"{where}: no list"]
    return [x for i, one in enumerate(value) for x in misfits(one, shape[0], f"{where}.{i}")]
  if isinstance(shape, dict):
    if not isinstance(value, dict):
      return [f"{where}: no object"]
    shapes = {field.rstrip("!"): one for field, one in shape.items() if field is not str}
    needed = {field[:-1] for field in shape if field is not str and field.endswith("!")}
    found = [f"{where}.{field}: missing" for field in needed - set(value)]
    for field, one in value.items():
      if field not in shapes and str not in shape:
        found.append(f"{where}.{field}: unknown")
      else:
        found += misfits(one, shapes.get(field, shape.get(str)), f"{where}.{field}")
    return found
  if isinstance(shape, type):
    fits = type(value) is shape
  elif isinstance(shape, re.Pattern):
    fits = isinstance(value, str) and shape.fullmatch(value)
  else:  # a set of strings or a range, in which True would be too
    fits = type(value) is (int if isinstance(shape, range) else str) and value in shape
  return [] if fits else [f"{where}: {value!r} does not fit"]


def disagreements(jobset):
  """Fields that the servers refuse together, of a JobSet in which each alone is right."""
  for replicated in jobset["spec"]["replicatedJobs"]:
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    containers = {container["name"] for container in pod["containers"]}
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if job.get("completionMode") == "Indexed" and "completions" not in job:
      yield "Indexed without completions"
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
      if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy without restartPolicy Never"
      if ("onExitCodes" in rule) == ("onPodConditions" in rule):
        yield "a rule needs one of onExitCodes and onPodConditions"
      if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in job:
        yield "FailIndex without backoffLimitPerIndex"
      codes = rule.get("onExitCodes", {"values": [1], "operator": "In"})
      if not codes["values"] or codes["values"] != sorted(set(codes["values"])):
        yield "exit codes not in order"
      if codes["operator"] == "In" and 0 in codes["values"]:
        yield "exit code 0 is no failure"
      if codes.get("containerName", "main") not in containers:
        yield "exit codes of an unknown container"
    if len(set(volumes)) < len(volumes):
      yield "two volumes of one name"
    for volume in pod.get("volumes", []):
      if len(volume) != 2:
        yield "a volume needs one source"
    for container in pod["containers"]:
      mounts = container.get("volumeMounts", [])
      if not {mount["name"] for mount in mounts} <= set(volumes):
        yield "mount of an unknown volume"
      if len({mount["mountPath"] for mount in mounts}) < len(mounts):
        yield "two mounts at one path"
